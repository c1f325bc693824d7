// SPDX-License-Identifier: GPL-2.0-only
/* struct_ops.c - the struct_ops type pagecache_ops: what BPF may load. */
#include <linux/bpf.h>
#include <linux/bpf_verifier.h>
#include <linux/btf.h>

#include "hooks.h"
#include "policy.h"

/* The module's own types, set before any policy can be loaded. */
static const struct btf *pcb_btf;
static s32 pcb_ops_id;

/* Types a policy may write to: the answer, nothing else. */
static const struct btf_type *pcb_answer_type;

/* The hook of each member of struct pagecache_ops. */
static const struct {
	unsigned int offset;
	enum pagecache_hook hook;
} pcb_hook_members[] = {
	{ offsetof(struct pagecache_ops, init), PAGECACHE_HOOK_INIT },
	{ offsetof(struct pagecache_ops, exit), PAGECACHE_HOOK_EXIT },
	{ offsetof(struct pagecache_ops, readahead), PAGECACHE_HOOK_READAHEAD },
	{ offsetof(struct pagecache_ops, access), PAGECACHE_HOOK_ACCESS },
	{ offsetof(struct pagecache_ops, added), PAGECACHE_HOOK_ADDED },
	{ offsetof(struct pagecache_ops, removed), PAGECACHE_HOOK_REMOVED },
	{ offsetof(struct pagecache_ops, evict), PAGECACHE_HOOK_EVICT },
	{ offsetof(struct pagecache_ops, pressure), PAGECACHE_HOOK_PRESSURE },
};

/*
 * The hook that a program is for; negative: it is none of ours.  While a struct_ops program is
 * being verified, attach_btf_id is its struct and expected_attach_type the number of its member
 * (check_struct_ops_btf_id() in kernel/bpf/verifier.c).
 */
int pcb_hook_of_program(const struct bpf_prog *prog)
{
	const struct btf_type *type;
	unsigned int i, offset;

	if (!pcb_btf || prog->aux->attach_btf != pcb_btf || prog->aux->attach_btf_id != pcb_ops_id)
		return -ENOENT;
	type = btf_type_by_id(pcb_btf, pcb_ops_id);
	if (!type || prog->expected_attach_type >= btf_type_vlen(type))
		return -ENOENT;
	offset = __btf_member_bit_offset(type, btf_members(type) + prog->expected_attach_type) / 8;
	for (i = 0; i < ARRAY_SIZE(pcb_hook_members); i++) {
		if (pcb_hook_members[i].offset == offset)
			return pcb_hook_members[i].hook;
	}
	return -ENOENT;
}

/* The name of a kernel function of this module, by its id in the module's BTF. */
const char *pcb_kfunc_name(u32 id)
{
	const struct btf_type *type = pcb_btf ? btf_type_by_id(pcb_btf, id) : NULL;

	return type ? pcb_btf_name_of(pcb_btf, type->name_off) : NULL;
}

static int pcb_init(struct btf *btf)
{
	s32 id = pcb_btf_find_id(btf, "pagecache_answer", BTF_KIND_STRUCT);

	pcb_ops_id = pcb_btf_find_id(btf, "pagecache_ops", BTF_KIND_STRUCT);
	if (id < 0 || pcb_ops_id < 0)
		return -ENOENT;
	pcb_answer_type = btf_type_by_id(btf, id);
	pcb_btf = btf;
	return 0;
}

static int pcb_check_member(const struct btf_type *t, const struct btf_member *member,
			    const struct bpf_prog *prog)
{
	return prog->sleepable ? -EINVAL : 0;
}

static int pcb_init_member(const struct btf_type *t, const struct btf_member *member, void *kdata,
			   const void *udata)
{
	const struct pagecache_ops *from = udata;
	struct pagecache_ops *to = kdata;

	/* 1: taken care of; 0: left to the core, which accepts only zeroes and hooks. */
	switch (__btf_member_bit_offset(t, member) / 8) {
	case offsetof(struct pagecache_ops, access_step_bytes):
		to->access_step_bytes = from->access_step_bytes;
		return 1;
	case offsetof(struct pagecache_ops, abi_version):
		if (from->abi_version != PAGECACHE_ABI_VERSION)
			return -EPROTO;
		to->abi_version = from->abi_version;
		return 1;
	case offsetof(struct pagecache_ops, flags):
		if (from->flags & ~PAGECACHE_OPS_EVICT_OPTIONAL)
			return -EINVAL;
		to->flags = from->flags;
		return 1;
	case offsetof(struct pagecache_ops, name):
		if (strnlen(from->name, sizeof(from->name)) == sizeof(from->name) || !from->name[0])
			return -EINVAL;
		strscpy(to->name, from->name, sizeof(to->name));
		return 1;
	}
	return 0;
}

static bool pcb_is_valid_access(int off, int size, enum bpf_access_type type,
				const struct bpf_prog *prog, struct bpf_insn_access_aux *info)
{
	return bpf_tracing_btf_ctx_access(off, size, type, prog, info);
}

static int pcb_btf_struct_access(struct bpf_verifier_log *log, const struct bpf_reg_state *reg,
				 int off, int size)
{
	const struct btf_type *t = btf_type_by_id(reg->btf, reg->btf_id);

	if (t != pcb_answer_type) {
		bpf_log(log, "only struct pagecache_answer can be written\n");
		return -EACCES;
	}
	if (off < 0 || off + size > sizeof(struct pagecache_answer)) {
		bpf_log(log, "write behind the end of struct pagecache_answer\n");
		return -EACCES;
	}
	return 0;
}

static const struct bpf_verifier_ops pcb_verifier_ops = {
	.get_func_proto = bpf_base_func_proto,
	.is_valid_access = pcb_is_valid_access,
	.btf_struct_access = pcb_btf_struct_access,
};

static s32 pcb_stub_init(struct pagecache_ctx *ctx)
{
	return 0;
}

static void pcb_stub_exit(struct pagecache_exit_record *record)
{
}

static s32 pcb_stub_readahead(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	return PAGECACHE_DEFAULT;
}

static void pcb_stub_access(struct pagecache_ctx *ctx)
{
}

static void pcb_stub_added(struct pagecache_ctx *ctx)
{
}

static void pcb_stub_removed(struct pagecache_ctx *ctx)
{
}

static s32 pcb_stub_evict(struct pagecache_ctx *ctx)
{
	return PAGECACHE_EVICT_DEFAULT;
}

static void pcb_stub_pressure(struct pagecache_ctx *ctx, struct pagecache_pressure *want)
{
}

static struct pagecache_ops pcb_cfi_stubs = {
	.init = pcb_stub_init,
	.exit = pcb_stub_exit,
	.readahead = pcb_stub_readahead,
	.access = pcb_stub_access,
	.added = pcb_stub_added,
	.removed = pcb_stub_removed,
	.evict = pcb_stub_evict,
	.pressure = pcb_stub_pressure,
};

static struct bpf_struct_ops pcb_struct_ops = {
	.verifier_ops = &pcb_verifier_ops,
	.init = pcb_init,
	.check_member = pcb_check_member,
	.init_member = pcb_init_member,
	.reg = pcb_reg,
	.unreg = pcb_unreg,
	.update = pcb_update,
	.cfi_stubs = &pcb_cfi_stubs,
	.name = "pagecache_ops",
	.owner = THIS_MODULE,
};

int pcb_struct_ops_register(void)
{
	return register_bpf_struct_ops(&pcb_struct_ops, pagecache_ops);
}
