// Everything under cuda/: what an editor indexes, and what the compile gate compiles with every registered stub.
#include "attention.cuh"
#include "moe.cuh"
