/* What a test sees of the last launch, by dlsym of `fake`. */
#include "nvidia.h"

typedef struct {
  ml_cu_launch_config config;
  ml_cu_launch_attribute attributes[4];
  CUfunction function;
  CUcontext context; /* the current one */
  int argument;      /* the first one, an int */
  int launches, loads, retains, shared_bytes;
  unsigned answer;         /* of the launches to come */
  unsigned answer_to_load; /* of the binaries to come */
} fake_state;
