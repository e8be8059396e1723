#line 1 "room.cuh"

#line 1 "common/a.cuh"

#line 1 "common/b.cuh"

int b;
#line 3 "common/a.cuh"
#include <cuda_fp16.h>
int a;
#line 3 "room.cuh"
#line 4 "room.cuh"
int room;
#line 1 "stub"
INSTANTIATE(room)
