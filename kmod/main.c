// SPDX-License-Identifier: GPL-2.0-only
/* main.c - parameters, start and end of the module. */
#include <linux/completion.h>
#include <linux/init.h>
#include <linux/module.h>
#include <linux/rcupdate.h>

#include "canary.h"
#include "control.h"
#include "hooks.h"
#include "placement.h"
#include "prefetch.h"
#include "streams.h"
#include "tags.h"

#define PCB_PARAM(name, type, value, text)                \
	type pcb_##name = value;                          \
	module_param_named(name, pcb_##name, type, 0444); \
	MODULE_PARM_DESC(name, text)

typedef unsigned int uint;

PCB_PARAM(max_answer_mib, uint, 64, "MiB one readahead answer may read (default 64)");
PCB_PARAM(max_extent_mib, uint, 256, "MiB one prefetch request may ask for (default 256)");
PCB_PARAM(max_inflight_mib, uint, 1024, "MiB a policy may have queued for prefetch (default 1024)");
PCB_PARAM(workers, uint, 2, "prefetch workers per NUMA node (default 2)");
PCB_PARAM(max_invalid, uint, 100, "invalid answers that end a policy (default 100)");
PCB_PARAM(max_keep_percent, uint, 50, "percent of the memory one policy may keep (default 50)");
PCB_PARAM(max_evict_us, uint, 250, "microseconds an evict hook may take, on average (default 250)");
PCB_PARAM(max_lent, uint, 4096, "files that all sessions together may lend (default 4096)");

struct workqueue_struct *pcb_wq;
struct percpu_ref pcb_active;
static DECLARE_COMPLETION(pcb_inactive);

static void pcb_active_release(struct percpu_ref *ref)
{
	complete(&pcb_inactive);
}

/* Wait for every task that runs or sleeps in a function of ours that replaced the kernel's. */
static void pcb_active_drain(void)
{
	percpu_ref_kill(&pcb_active);
	wait_for_completion(&pcb_inactive);
	/* They have put their reference, but may not have returned from us yet. */
	synchronize_rcu_tasks();
	percpu_ref_exit(&pcb_active);
}

static int pcb_check_params(void)
{
	if (!pcb_max_answer_mib || !pcb_max_extent_mib || !pcb_max_inflight_mib || !pcb_workers ||
	    !pcb_max_invalid || !pcb_max_evict_us || pcb_workers > 64 ||
	    pcb_max_answer_mib > 4096 || pcb_max_keep_percent > 90) {
		pr_err("a parameter is out of range: workers 1-64, max_answer_mib 1-4096, "
		       "max_keep_percent 0-90, the others at least 1\n");
		return -EINVAL;
	}
	return 0;
}

static int __init pcb_module_init(void)
{
	int err;

	err = pcb_check_params();
	if (err)
		return err;
	err = pcb_symbols_init();
	err = err ?: pcb_prototypes_init();
	err = err ?: pcb_read_prepare();
	pcb_placement_prepare();
	err = err ?: pcb_hooks_prepare();
	if (err)
		return err;

	err = percpu_ref_init(&pcb_active, pcb_active_release, 0, GFP_KERNEL);
	if (err)
		goto fail_ref;
	pcb_wq = alloc_workqueue("pagecache_bpf", WQ_UNBOUND, 0);
	if (!pcb_wq) {
		err = -ENOMEM;
		goto fail_wq;
	}
	err = pcb_tags_init();
	if (err)
		goto fail_tags;
	err = pcb_workers_start();
	if (err)
		goto fail_prefetch;
	err = pcb_canary_prepare();
	if (err)
		goto fail_canary;
	err = pcb_control_init();
	if (err)
		goto fail_control;
	/* Last: from here on policies can be attached, and cannot be taken back. */
	err = pcb_kfuncs_register();
	err = err ?: pcb_struct_ops_register();
	if (err)
		goto fail_register;
	return 0;

fail_register:
	pcb_control_exit();
fail_control:
	pcb_canary_release();
fail_canary:
	pcb_workers_stop();
fail_prefetch:
	pcb_tags_free();
fail_tags:
	destroy_workqueue(pcb_wq);
fail_wq:
	percpu_ref_exit(&pcb_active);
fail_ref:
	pcb_hooks_release();
	return err;
}

/* Each attached policy holds the module: none is attached now, and no hook is on. */
static void __exit pcb_module_exit(void)
{
	pcb_control_exit();
	pcb_tags_clear();
	pcb_canary_release();
	pcb_hooks_release();
	pcb_active_drain();
	pcb_workers_stop();
	destroy_workqueue(pcb_wq);
	rcu_barrier();
	pcb_tags_free();
}

module_init(pcb_module_init);
module_exit(pcb_module_exit);

MODULE_LICENSE("GPL");
MODULE_AUTHOR("the pagecache-bpf authors");
MODULE_DESCRIPTION("Programmable page cache: struct_ops policies for tagged files");
MODULE_VERSION("0.1.0");
