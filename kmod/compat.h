/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * compat.h - all kernel drift.  Kbuild probes the headers and defines PCB_HAVE_*; versions
 * are only named in comments.
 */
#ifndef PCB_COMPAT_H
#define PCB_COMPAT_H

#include <linux/fs.h>
#include <linux/ftrace.h>
#include <linux/pagemap.h>

/*
 * v6.17 moved the folio order of readahead into struct file_ra_state (commit 276fa8c7ae68,
 * "mm/readahead: store folio order in struct file_ra_state"): page_cache_ra_order() lost
 * its third argument.
 */
#ifdef PCB_HAVE_RA_ORDER_FIELD
#define PCB_RA_ORDER_ARGS struct readahead_control *ractl, struct file_ra_state *ra
#define pcb_ra_order_call(fn, ractl, ra, ord) ((ra)->order = (ord), (fn)(ractl, ra))
#define PCB_RA_ORDER_NAMES ractl, ra
#else
#define PCB_RA_ORDER_ARGS \
	struct readahead_control *ractl, struct file_ra_state *ra, unsigned int order
#define pcb_ra_order_call(fn, ractl, ra, ord) (fn)(ractl, ra, ord)
#define PCB_RA_ORDER_NAMES ractl, ra, order
#endif

/*
 * Direct calls from ftrace take an ftrace_ops since v6.4 (commit 59495740f7ac, "ftrace: Replace
 * uses of _ftrace_direct APIs with _ftrace_direct_multi"); the code that is called is per
 * architecture.
 */
#if defined(PCB_HAVE_DIRECT_OPS) && defined(CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS) && \
	defined(CONFIG_X86_64)
#define PCB_DIRECT
#endif

#endif /* PCB_COMPAT_H */
