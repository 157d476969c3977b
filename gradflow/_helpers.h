#pragma once
#include <stdint.h>

#include "_portable.h"

typedef void piece_function(void *context, int64_t piece);

/* Calls `work` once for every piece from 0 on, on the calling thread and up to threads - 1 others, and returns when all
 * is done. Which thread takes which piece is not fixed. */
INTERNAL void share_out(piece_function *work, void *context, int64_t pieces, int64_t threads);
