"""FCN with pixel contrast for mmsegmentation's runner.

In this folder, which must be on PYTHONPATH:

    python -c "from mmengine import Config, runner; runner.Runner.from_cfg(Config.fromfile('config.py')).train()"

or with `tools/train.py config.py` of mmsegmentation.
"""

custom_imports = dict(imports=["pixel_contrast"])
default_scope = "mmseg"
work_dir = "work"

classes = 5
norm = dict(type="BN")  # SyncBN on several GPUs
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(type="SegDataPreProcessor", size=(64, 64), seg_pad_val=255),
    backbone=dict(type="ResNetV1c", depth=18, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), norm_cfg=norm),
    decode_head=dict(
        type="FCNHeadWithContrast",
        in_channels=512,
        channels=64,
        num_convs=1,
        num_classes=classes,
        norm_cfg=norm,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=1.0),
        # What is new:
        embed_dim=32,
        contrast=dict(
            weight=0.1,
            warmup_steps=5,
            min_pixels=5,
            bank=dict(region_slots=100, pixel_slots=500),
            mining=dict(strategy="semi-hard"),
        ),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)

train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(type="Scenes", count=40, size=64),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="Scenes", count=8, size=64),
)
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
train_cfg = dict(type="IterBasedTrainLoop", max_iters=15, val_interval=15)
val_cfg = dict(type="ValLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3))
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=15),
)
log_processor = dict(by_epoch=False, window_size=1)
