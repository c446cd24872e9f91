"""What the ops are compared with, each written as its users would write it."""
