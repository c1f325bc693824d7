// SPDX-License-Identifier: GPL-2.0-only
/* trace.c - the module's trace events are defined here (trace.h). */
#define CREATE_TRACE_POINTS
#include "trace.h"
