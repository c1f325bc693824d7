// SPDX-License-Identifier: GPL-2.0-only
/*
 * canary.c - do the hooks that were attached really run?
 *
 * ftrace may have patched a function that nobody calls: a compiler that inlines it where it matters
 * (LTO, -Os), or another tool that has taken its place, leaves a hook which is attached and silent.
 * So whenever a policy is attached, a file of the module's own is read, mapped, dropped and closed,
 * as anybody's would be, by the kernel's own functions.  Its tag has no policy: hooks note in it
 * that they were there.  If one of those that the policy needs was not, nothing is attached.
 *
 * The file lies in a file system that is mounted nowhere; its pages are zeroes and need no device.
 * Two functions cannot be tried: try_to_free_mem_cgroup_pages(), which would take somebody's
 * memory, and security_sb_umount(), without which policies work.
 */
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/fs_context.h>
#include <linux/mman.h>
#include <linux/mount.h>
#include <linux/pagemap.h>
#include <linux/pseudo_fs.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "canary.h"
#include "hooks.h"
#include "hooks_evict.h"
#include "tags.h"

#define PCB_CANARY_MAGIC 0x70636221
#define PCB_CANARY_PAGES 64
#define PCB_CANARY_WINDOW 32 /* pages: readahead of the file */
#define PCB_CANARY_READS 8 /* pages; one of the first four gets a readahead marker */
#define PCB_CANARY_FAULT 56 /* page; no readahead of the reads comes that far */

/* What is to be seen of each hook. */
static const struct {
	enum pcb_sight sight;
	u32 hooks; /* of policies that need it */
	const char *function;
} pcb_sights[] = {
	{ PCB_SIGHT_MISS, BIT(PAGECACHE_HOOK_READAHEAD), "page_cache_sync_ra" },
	{ PCB_SIGHT_MARKER, BIT(PAGECACHE_HOOK_READAHEAD), "page_cache_async_ra" },
	{ PCB_SIGHT_FAULT, BIT(PAGECACHE_HOOK_READAHEAD), "page_cache_ra_order" },
	{ PCB_SIGHT_READ, BIT(PAGECACHE_HOOK_ACCESS), "filemap_read" },
	{ PCB_SIGHT_TOUCH, BIT(PAGECACHE_HOOK_ACCESS), "filemap_fault" },
	{ PCB_SIGHT_ADDED, PCB_ANY_HOOK, "mm_filemap_add_to_page_cache" },
	{ PCB_SIGHT_REMOVED, PCB_ANY_HOOK, "mm_filemap_delete_from_page_cache" },
	{ PCB_SIGHT_EVICT, BIT(PAGECACHE_HOOK_EVICT), "folio_referenced" },
	{ PCB_SIGHT_TRUNCATED, BIT(PAGECACHE_HOOK_PRESSURE), "truncate_inode_pages_final" },
	{ PCB_SIGHT_CLEARED, BIT(PAGECACHE_HOOK_PRESSURE), "clear_inode" },
};

static struct vfsmount *pcb_canary_mount;

static int pcb_canary_read_folio(struct file *file, struct folio *folio)
{
	folio_zero_range(folio, 0, folio_size(folio));
	folio_mark_uptodate(folio);
	folio_unlock(folio);
	return 0;
}

static const struct address_space_operations pcb_canary_aops = {
	.read_folio = pcb_canary_read_folio,
	.dirty_folio = noop_dirty_folio,
};

/* No other thread of the process that attaches may keep the mapping by forking. */
static int pcb_canary_mmap(struct file *file, struct vm_area_struct *vma)
{
	vm_flags_set(vma, VM_DONTCOPY | VM_DONTEXPAND | VM_DONTDUMP);
	return generic_file_readonly_mmap(file, vma);
}

static const struct file_operations pcb_canary_fops = {
	.owner = THIS_MODULE,
	.read_iter = generic_file_read_iter,
	.mmap = pcb_canary_mmap,
};

/* As file systems do that end inodes themselves: evict() has a copy of clear_inode() in it. */
static void pcb_canary_evict_inode(struct inode *inode)
{
	truncate_inode_pages_final(&inode->i_data);
	clear_inode(inode);
}

static const struct super_operations pcb_canary_super = {
	.statfs = simple_statfs,
	.evict_inode = pcb_canary_evict_inode,
};

static int pcb_canary_init_context(struct fs_context *fc)
{
	struct pseudo_fs_context *context = init_pseudo(fc, PCB_CANARY_MAGIC);

	if (!context)
		return -ENOMEM;
	context->ops = &pcb_canary_super;
	fc->s_iflags |= SB_I_NOEXEC | SB_I_NODEV;
	return 0;
}

/* Without an owner: its mount lives as long as the module, and must not keep it. */
static struct file_system_type pcb_canary_type = {
	.name = "pagecache_bpf",
	.init_fs_context = pcb_canary_init_context,
	.kill_sb = kill_anon_super,
};

int pcb_canary_prepare(void)
{
	pcb_canary_mount = kern_mount(&pcb_canary_type);
	return PTR_ERR_OR_ZERO(pcb_canary_mount);
}

void pcb_canary_release(void)
{
	kern_unmount(pcb_canary_mount);
}

static struct inode *pcb_canary_inode(void)
{
	struct inode *inode = new_inode(pcb_canary_mount->mnt_sb);

	if (!inode)
		return NULL;
	inode->i_ino = get_next_ino();
	inode->i_mode = S_IFREG | 0400;
	inode->i_flags |= S_PRIVATE; /* no business of security modules */
	inode->i_mapping->a_ops = &pcb_canary_aops;
	i_size_write(inode, (loff_t)PCB_CANARY_PAGES << PAGE_SHIFT);
	return inode;
}

static struct file *pcb_canary_open(void)
{
	struct inode *inode = pcb_canary_inode();
	struct file *file;

	if (!inode)
		return ERR_PTR(-ENOMEM);
	__module_get(THIS_MODULE); /* the file lets go of it */
	file = alloc_file_pseudo(inode, pcb_canary_mount, "canary", O_RDONLY, &pcb_canary_fops);
	if (IS_ERR(file)) {
		module_put(THIS_MODULE);
		iput(inode);
		return file;
	}
	file->f_ra.ra_pages = PCB_CANARY_WINDOW;
	file->f_ra.prev_pos = -1;
	return file;
}

static int pcb_canary_read(struct file *file)
{
	int page;

	for (page = 0; page < PCB_CANARY_READS; page++) {
		loff_t at = (loff_t)page << PAGE_SHIFT;
		ssize_t got;
		char byte;

		got = kernel_read(file, &byte, 1, &at);
		if (got != 1)
			return got < 0 ? got : -EIO;
	}
	return 0;
}

/* A fault of the process that attaches. */
static int pcb_canary_fault(struct file *file)
{
	size_t size = PCB_CANARY_PAGES << PAGE_SHIFT;
	unsigned long at = vm_mmap(file, 0, size, PROT_READ, MAP_PRIVATE, 0);
	char byte;
	int err;

	if (IS_ERR_VALUE(at))
		return at;
	err = get_user(byte, (char __user *)(at + (PCB_CANARY_FAULT << PAGE_SHIFT)));
	vm_munmap(at, size);
	return err;
}

static int pcb_canary_reclaim(struct file *file)
{
	struct folio *folio = filemap_lock_folio(file->f_mapping, 0);

	if (IS_ERR(folio))
		return PTR_ERR(folio);
	pcb_evict_try(folio);
	folio_unlock(folio);
	folio_put(folio);
	return 0;
}

/* Goes the ways of a file with hooks.  Returns the first error; closes the file. */
static int pcb_canary_use(struct file *file, u32 hooks)
{
	int err = pcb_canary_read(file);

	err = err ?: pcb_canary_fault(file);
	if (!err && hooks & BIT(PAGECACHE_HOOK_EVICT))
		err = pcb_canary_reclaim(file);
	truncate_inode_pages(file->f_mapping, 0);
	__fput_sync(file);
	return err;
}

/*
 * Tries the hooks of a policy, which are on.  Returns 0; -EOPNOTSUPP: one did not run; another
 * error: it could not be tried.  *failed then says which, and what to do.
 */
int pcb_canary_try(u32 hooks, const char **failed)
{
	static char message[256];
	struct pcb_tag *tag;
	struct file *file;
	unsigned long seen;
	int i, err;

	lockdep_assert_held(&pcb_mutex);
	*failed = message;
	strscpy(message, "no memory to try the hooks on a file of the module's own");
	file = pcb_canary_open();
	if (IS_ERR(file))
		return PTR_ERR(file);
	tag = pcb_tag_canary(file_inode(file));
	if (!tag) {
		__fput_sync(file);
		return -ENOMEM;
	}
	err = pcb_canary_use(file, hooks);
	seen = pcb_tag_canary_end(tag);
	for (i = 0; i < ARRAY_SIZE(pcb_sights); i++) {
		if (!(pcb_sights[i].hooks & hooks) || seen & BIT(pcb_sights[i].sight))
			continue;
		if (err) {
			snprintf(message, sizeof(message),
				 "%s could not be tried on a file of the module's own: try again",
				 pcb_sights[i].function);
			return err;
		}
		snprintf(
			message, sizeof(message),
			"%s is hooked, but a file of the module's own was used and nothing came to "
			"the hook: is it inlined in this kernel, or taken by another tool? "
			"Engine agent does without",
			pcb_sights[i].function);
		return -EOPNOTSUPP;
	}
	return 0;
}
