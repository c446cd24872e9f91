// Lists a struct's fields for the seam to Python, which reads them by name (seam.h):
//
//   struct Sampling : Launch {
//     const int64_t* labels;
//     int64_t batch;
//     PXC_FIELDS((Launch), labels, batch)
//   };
//
// gives the struct a function `each_field(visit)` that calls visit("labels", labels) and so on for every
// field, first for those of the bases in parentheses; () means no base.
#pragma once

#define PXC_FIELDS(bases, ...)                \
  template <class Visit>                      \
  void each_field(Visit& visit) {             \
    PXC_EACH(PXC_BASE_FIELDS, PXC_BARE bases) \
    PXC_EACH(PXC_FIELD, __VA_ARGS__)          \
  }

#define PXC_BARE(...) __VA_ARGS__
#define PXC_BASE_FIELDS(Base) Base::each_field(visit);
#define PXC_FIELD(name) visit(#name, name);

// Expands to macro(first) macro(second) ... A macro may not expand itself, so each step leaves the next one
// for another scan. PXC_SCAN scans 4^3 times, enough for that many fields.
#define PXC_EACH(macro, ...) __VA_OPT__(PXC_SCAN(PXC_STEP(macro, __VA_ARGS__)))
#define PXC_STEP(macro, first, ...) macro(first) __VA_OPT__(PXC_NEXT_STEP PXC_PARENTHESES(macro, __VA_ARGS__))
#define PXC_NEXT_STEP() PXC_STEP
#define PXC_PARENTHESES ()
#define PXC_SCAN(...) PXC_SCAN_16(PXC_SCAN_16(PXC_SCAN_16(PXC_SCAN_16(__VA_ARGS__))))
#define PXC_SCAN_16(...) PXC_SCAN_4(PXC_SCAN_4(PXC_SCAN_4(PXC_SCAN_4(__VA_ARGS__))))
#define PXC_SCAN_4(...) PXC_SCAN_1(PXC_SCAN_1(PXC_SCAN_1(PXC_SCAN_1(__VA_ARGS__))))
#define PXC_SCAN_1(...) __VA_ARGS__
