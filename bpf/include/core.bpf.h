/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * core.bpf.h - what programs on tracepoints see of the kernel's types.
 *
 * Only the members that are read; where they lie, libbpf finds in the running kernel's BTF.
 */
#ifndef CORE_BPF_H
#define CORE_BPF_H

#include <bpf/bpf_core_read.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct backing_dev_info {
	unsigned long ra_pages;
	unsigned long io_pages;
};

struct user_namespace {
	int level; /* 0: the initial one */
};

struct super_block {
	u32 s_dev;
	unsigned long s_magic;
	struct backing_dev_info *s_bdi;
	struct user_namespace *s_user_ns;
};

struct address_space;

struct inode {
	struct super_block *i_sb;
	struct address_space *i_mapping;
	unsigned long i_ino;
	s64 i_size;
	u32 i_generation;
	u8 i_blkbits;
};

struct address_space {
	struct inode *host;
	unsigned long nrpages;
};

struct file;

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
};

struct files_struct {
	struct fdtable *fdt;
};

struct btrfs_root {
	u32 anon_dev;
};

struct btrfs_inode {
	struct btrfs_root *root;
	struct inode vfs_inode;
};

/* Until 53fbef56e07d ("mm: introduce memdesc_flags_t", 6.18) flags was a plain number. */
struct folio___plain {
	unsigned long flags;
};

typedef struct {
	unsigned long f;
} memdesc_flags_t;

/* Until ebc1baf5c9b4 ("mm: free up a word in the first tail page", 6.6). */
struct folio___ordered {
	unsigned char _folio_order;
};

struct folio {
	memdesc_flags_t flags;
	struct address_space *mapping;
	unsigned long index;
	unsigned long _flags_1; /* of a large folio; its lowest byte is the order */
};

/* Until 7b230db3b8d3 ("mm: Introduce struct folio", 5.16) events name the first page of a huge one.
 */
struct page {
	unsigned long flags;
	struct address_space *mapping;
	unsigned long index;
	unsigned char compound_order; /* of the second page */
};

enum pageflags {
	PG_head,
	PG_uptodate,
	PG_locked,
	PG_readahead,
	PG_reclaim,
};

struct bpf_iter_num {
	u64 opaque[1];
};

/* Helpers that are asked for: BTF has only the names of those that the kernel has. */
enum bpf_func_id {
	BPF_FUNC_find_vma = 180,
	BPF_FUNC_loop = 181,
	BPF_FUNC_get_func_arg = 183,
};
#pragma clang attribute pop

extern void *bpf_rdonly_cast(const void *object, u32 type) __ksym __weak;

/*
 * Whether bpf_rdonly_cast() is used: where its younger neighbor is (6.4, commit 6018e1f407cc).  The
 * kernel is not asked for the function itself (bpf_ksym_exists()): between a35b9af4ec2c (6.2) and
 * 58aa2afbb1e6 (6.4) it has the function and refuses every program with that question in it.
 */
#define DIRECT_LOADS bpf_core_type_exists(struct bpf_iter_num)

/*
 * A member of a kernel object, or of what it leads to: LOAD(folio, mapping, host).  The kernel
 * turns such a load into one instruction, and into a zero where the address is none, if it has
 * bpf_rdonly_cast(); before that a helper is called for each step.
 */
#define LOAD(pointer, ...)                                                                      \
	({                                                                                      \
		typeof(pointer) object_ = (pointer);                                            \
		typeof(___arrow_of(object_, __VA_ARGS__)) value_;                               \
		if (DIRECT_LOADS) {                                                             \
			object_ = bpf_rdonly_cast(object_,                                      \
						  bpf_core_type_id_kernel(typeof(*(pointer)))); \
			value_ = ___arrow_of(object_, __VA_ARGS__);                             \
		} else {                                                                        \
			value_ = BPF_CORE_READ(object_, __VA_ARGS__);                           \
		}                                                                               \
		value_;                                                                         \
	})
#define ___arrow_of(...) ___apply(___arrow, ___narg(__VA_ARGS__))(__VA_ARGS__)

/* The file of a mapping and its inode number: what every read of any file pays for. */
static __always_inline struct inode *host_of(struct address_space *mapping, u64 *number)
{
	struct inode *inode = LOAD(mapping, host);

	*number = LOAD(inode, i_ino);
	return inode;
}

#define BTRFS_SUPER_MAGIC 0x9123683e

/*
 * The device in a file's identity: that of its superblock.  The subvolumes and snapshots of a btrfs
 * share one, and number their files alike, generations included; there it is the subvolume's own
 * device, which stat() tells, too.
 */
static __always_inline u32 device_of(struct inode *inode, struct super_block *sb)
{
	u32 dev = LOAD(sb, s_dev);
	struct btrfs_inode *own;

	if (dev >> 20 || !bpf_core_field_exists(struct btrfs_inode, root) ||
	    LOAD(sb, s_magic) != BTRFS_SUPER_MAGIC)
		return dev;
	own = (void *)inode - bpf_core_field_offset(struct btrfs_inode, vfs_inode);
	return BPF_CORE_READ(own, root, anon_dev);
}

/* What is a folio here is the first page of one before there were folios. */
static __always_inline struct address_space *mapping_of(struct folio *folio)
{
	struct page *page = (void *)folio;

	return bpf_core_type_exists(struct folio) ? LOAD(folio, mapping) : LOAD(page, mapping);
}

static __always_inline u64 index_of(struct folio *folio)
{
	struct page *page = (void *)folio;

	return bpf_core_type_exists(struct folio) ? LOAD(folio, index) : LOAD(page, index);
}

static __always_inline u64 folio_flags(struct folio *folio)
{
	struct folio___plain *plain = (void *)folio;
	struct page *page = (void *)folio;

	if (!bpf_core_type_exists(struct folio))
		return LOAD(page, flags);
	if (bpf_core_field_exists(plain->flags))
		return LOAD(plain, flags);
	return LOAD(folio, flags.f);
}

static __always_inline u64 folio_pages(struct folio *folio)
{
	struct folio___ordered *ordered = (void *)folio;
	struct page *page = (void *)folio;

	if (!(folio_flags(folio) >> bpf_core_enum_value(enum pageflags, PG_head) & 1))
		return 1;
	if (!bpf_core_type_exists(struct folio)) {
		page = (void *)page + bpf_core_type_size(struct page);
		return 1ULL << (LOAD(page, compound_order) & 31);
	}
	if (bpf_core_field_exists(ordered->_folio_order))
		return 1ULL << (LOAD(ordered, _folio_order) & 31);
	return 1ULL << (LOAD(folio, _flags_1) & 31);
}

#endif /* CORE_BPF_H */
