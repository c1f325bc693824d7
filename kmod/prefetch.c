// SPDX-License-Identifier: GPL-2.0-only
/* prefetch.c - what a policy asks for: reads and drops, carried out later by workers. */
#include <linux/fs.h>
#include <linux/kdev_t.h>
#include <linux/sizes.h>

#include "placement.h"
#include "prefetch.h"
#include "sessions.h"
#include "streams.h"

#define PCB_MIN_MARK_STEP max(SZ_64K >> PAGE_SHIFT, 1) /* a marker costs a call of the policy */

static s64 pcb_refuse(struct pcb_call *call, s64 err)
{
	pcb_count(call->policy, refused_calls, 1);
	return err;
}

/* An extent to read, cut to the file and to the bounds of the module.  Returns 0 or an errno. */
static int pcb_read_extent(const struct pcb_call *call, u64 file_pages,
			   const struct pagecache_file_extent *wish, struct pcb_extent *extent)
{
	u64 bound = pcb_mib_to_pages(pcb_max_inflight_mib);
	u64 inflight = max_t(s64, atomic64_read(&call->policy->inflight), 0);
	u64 start = wish->start, nr = wish->nr;
	u32 step = wish->mark_step;

	if (start >= file_pages || !nr)
		return -EINVAL;
	if (inflight >= bound)
		return -EDQUOT;
	nr = min(nr, file_pages - start);
	nr = min_t(u64, nr, pcb_mib_to_pages(pcb_max_extent_mib));
	nr = min(nr, bound - inflight);
	*extent = (struct pcb_extent){
		.op = PCB_OP_READ,
		.order = PAGECACHE_ORDER_AUTO,
		.start = start,
		.end = start + nr,
		.mark_step = step ? max_t(u32, step, PCB_MIN_MARK_STEP) : 0,
		.mark = step ? start : PAGECACHE_NO_MARK,
		.dropbehind = call->ctx.flags & PAGECACHE_F_DONTCACHE,
	};
	return 0;
}

/* An extent to drop, cut to the file.  Returns 0 or an errno. */
static int pcb_drop_extent(u64 file_pages, u64 start, u64 nr, struct pcb_extent *extent)
{
	if (start >= file_pages || !nr)
		return -EINVAL;
	*extent = (struct pcb_extent){
		.op = PCB_OP_DROP,
		.start = start,
		.end = start + min(nr, file_pages - start),
		.mark = PAGECACHE_NO_MARK,
	};
	return 0;
}

static s64 pcb_prefetch_counted(struct pcb_policy *p, const struct pcb_extent *extent)
{
	u64 nr = extent->end - extent->start;

	pcb_count(p, prefetch_calls, 1);
	pcb_count(p, prefetch_bytes, nr << PAGE_SHIFT);
	return nr;
}

s64 pcb_prefetch_queue(struct pcb_call *call, pgoff_t start, u64 nr, s32 node, u32 mark_step)
{
	struct pagecache_file_extent wish = { .start = start, .nr = nr, .mark_step = mark_step };
	struct pcb_policy *p = call->policy;
	struct pcb_extent extent;
	int err = -EINVAL;

	if (call->file)
		err = pcb_read_extent(call, call->ctx.file_pages, &wish, &extent);
	if (!err)
		err = pcb_enqueue(p, call->file, pcb_node_allowed(node) ? node : PAGECACHE_NODE_ANY,
				  &extent);
	return err ? pcb_refuse(call, err) : pcb_prefetch_counted(p, &extent);
}

static u64 pcb_pages_of(const struct file *file)
{
	return DIV_ROUND_UP_ULL(i_size_read(file->f_mapping->host), PAGE_SIZE);
}

/* Queues an extent of a lent file for the current task; @extent is filled in. */
static int pcb_enqueue_lent(struct pcb_call *call, const struct pagecache_file_extent *wish,
			    enum pcb_op op, struct pcb_extent *extent)
{
	s32 node =
		op == PCB_OP_READ && pcb_node_allowed(wish->node) ? wish->node : PAGECACHE_NODE_ANY;
	struct pcb_stream_key key;
	int err;

	if (!call->file)
		return -EINVAL;
	err = pcb_key_of_current(&key, call->policy, node);
	if (err)
		return err;
	spin_lock(&pcb_lock);
	key.file = pcb_lent_file(call->policy, &wish->file);
	if (!key.file)
		err = -EXDEV;
	else if (op == PCB_OP_READ)
		err = pcb_read_extent(call, pcb_pages_of(key.file), wish, extent);
	else
		err = pcb_drop_extent(pcb_pages_of(key.file), wish->start, wish->nr, extent);
	err = err ?: pcb_enqueue_locked(&key, extent);
	spin_unlock(&pcb_lock);
	pcb_key_put(&key);
	return err;
}

s64 pcb_prefetch_file(struct pcb_call *call, const struct pagecache_file_extent *wish)
{
	struct pcb_extent extent;
	int err = pcb_enqueue_lent(call, wish, PCB_OP_READ, &extent);

	if (err)
		return pcb_refuse(call, err);
	pcb_count(call->policy, prefetch_lent_bytes,
		  (u64)(extent.end - extent.start) << PAGE_SHIFT);
	return pcb_prefetch_counted(call->policy, &extent);
}

s64 pcb_drop_file(struct pcb_call *call, const struct pagecache_file_extent *wish)
{
	struct pcb_extent extent;
	int err = pcb_enqueue_lent(call, wish, PCB_OP_DROP, &extent);

	if (err)
		return pcb_refuse(call, err);
	pcb_count(call->policy, drop_calls, 1);
	return extent.end - extent.start;
}

/* Which file was lent after the one of the call.  Returns its pages; 0: there is none. */
s64 pcb_next_file(struct pcb_call *call, struct pagecache_file_key *next)
{
	const struct inode *inode;
	struct file *file;
	s64 pages = 0;

	*next = (struct pagecache_file_key){};
	if (!call->file)
		return -EINVAL;
	spin_lock(&pcb_lock);
	file = pcb_lent_next(call);
	if (file) {
		inode = file->f_mapping->host;
		next->ino = inode->i_ino;
		next->dev_major = MAJOR(inode->i_sb->s_dev);
		next->dev_minor = MINOR(inode->i_sb->s_dev);
		next->generation = inode->i_generation;
		pages = pcb_pages_of(file);
	}
	spin_unlock(&pcb_lock);
	return pages;
}

/* Notes a drop in a pressure hook; the worker that called the hook carries it out. */
static s64 pcb_drop_note(struct pcb_call *call, pgoff_t start, u64 nr)
{
	struct pcb_drops *drops = call->drops;

	if (drops->nr == ARRAY_SIZE(drops->at))
		return pcb_refuse(call, -ENOSPC);
	drops->at[drops->nr].start = start;
	drops->at[drops->nr].end = start + nr;
	drops->nr++;
	pcb_count(call->policy, drop_calls, 1);
	return nr;
}

s64 pcb_drop_queue(struct pcb_call *call, pgoff_t start, u64 nr)
{
	struct pcb_extent extent;
	int err = pcb_drop_extent(call->ctx.file_pages, start, nr, &extent);

	if (!err && call->drops)
		return pcb_drop_note(call, start, extent.end - start);
	if (!err)
		err = call->file
			      ? pcb_enqueue(call->policy, call->file, PAGECACHE_NODE_ANY, &extent)
			      : -EINVAL;
	if (err)
		return pcb_refuse(call, err);
	pcb_count(call->policy, drop_calls, 1);
	return extent.end - start;
}
