// SPDX-License-Identifier: GPL-2.0-only
/*
 * placement.c - on which NUMA node a worker reads for the current task.
 *
 * The kernel's own readahead allocates in the reader: from the nodes of its cpuset, by its memory
 * policy (numactl).  A worker does as the reader would.  It is bound to the CPUs of a node that the
 * reader's cpuset has, and takes on the reader's memory policy while it reads.  A node that a
 * policy (BPF) names comes before the reader's preference, not before its limits.
 */
#include <linux/cpuset.h>
#include <linux/mempolicy.h>
#include <linux/nodemask.h>
#include <linux/sched/task.h>
#include <linux/static_call.h>
#include <linux/topology.h>

#include "hooks.h"
#include "placement.h"
#include "streams.h"

#ifdef CONFIG_NUMA

static void pcb_no_mpol_put(struct mempolicy *policy)
{
}

pcb_check_prototype(__mpol_put, pcb_no_mpol_put);
DEFINE_STATIC_CALL(pcb_mpol_put, pcb_no_mpol_put);
static bool pcb_mempolicies; /* __mpol_put() is not exported, and was found */

void pcb_placement_prepare(void)
{
	unsigned long addr = pcb_symbol("__mpol_put");

	if (!addr)
		return;
	static_call_update(pcb_mpol_put, (typeof(&pcb_no_mpol_put))addr);
	pcb_mempolicies = true;
}

/* The current task's memory policy with a reference, or NULL: it has none. */
struct mempolicy *pcb_mempolicy_of_current(void)
{
	struct mempolicy *policy = pcb_mempolicies ? current->mempolicy : NULL;

	mpol_get(policy);
	return policy;
}

void pcb_mempolicy_put(struct mempolicy *policy)
{
	if (policy)
		static_call(pcb_mpol_put)(policy);
}

/* Sets the NUMA memory policy of the current task, a worker; returns the one before. */
struct mempolicy *pcb_mempolicy_set(struct mempolicy *policy)
{
	struct mempolicy *old = current->mempolicy;

	if (policy == old)
		return old;
	task_lock(current);
	current->mempolicy = policy;
	task_unlock(current);
	return old;
}

static bool pcb_bound_elsewhere(s32 node)
{
	const struct mempolicy *policy = current->mempolicy;

	return policy && policy->mode == MPOL_BIND && !node_isset(node, policy->nodes);
}

#else

void pcb_placement_prepare(void)
{
}

struct mempolicy *pcb_mempolicy_of_current(void)
{
	return NULL;
}

void pcb_mempolicy_put(struct mempolicy *policy)
{
}

struct mempolicy *pcb_mempolicy_set(struct mempolicy *policy)
{
	return NULL;
}

static bool pcb_bound_elsewhere(s32 node)
{
	return false;
}

#endif

/* Whether there are workers on the node, and the current task may have memory there. */
bool pcb_node_allowed(s32 node)
{
	return pcb_node_known(node) && node_isset(node, cpuset_current_mems_allowed) &&
	       !pcb_bound_elsewhere(node);
}

/* The node whose workers read for the current task; -1: none may. */
s32 pcb_node_of_current(void)
{
	s32 node = numa_node_id();

	if (pcb_node_known(node) && node_isset(node, cpuset_current_mems_allowed))
		return node;
	for_each_node_mask(node, cpuset_current_mems_allowed)
	{
		if (pcb_node_known(node))
			return node;
	}
	return -1;
}
