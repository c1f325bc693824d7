// SPDX-License-Identifier: GPL-2.0-only
/* struct_ops.c - the struct_ops type pagecache_ops: what BPF may load, attach and detach. */
#include <linux/bpf.h>
#include <linux/bpf_verifier.h>
#include <linux/btf.h>
#include <linux/capability.h>
#include <linux/rculist.h>
#include <linux/timekeeping.h>

#include "call.h"
#include "hooks.h"

static u64 pcb_policy_seq;

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

#define PCB_DECIDING_HOOKS                                                                        \
	(BIT(PAGECACHE_HOOK_READAHEAD) | BIT(PAGECACHE_HOOK_ACCESS) | BIT(PAGECACHE_HOOK_ADDED) | \
	 BIT(PAGECACHE_HOOK_REMOVED) | BIT(PAGECACHE_HOOK_EVICT) | BIT(PAGECACHE_HOOK_PRESSURE))

/* Asks the policy's own init, before any hook can reach the policy. */
static int pcb_policy_init(struct pcb_policy *p)
{
	struct pcb_call call = { .policy = p, .hook = PAGECACHE_HOOK_INIT };
	int err;

	if (!p->kdata->init)
		return 0;
	call.ctx.node = PAGECACHE_NODE_ANY;
	call.ctx.page_shift = PAGE_SHIFT;
	call.ctx.time_ns = ktime_get_mono_fast_ns();
	rcu_read_lock();
	err = p->kdata->init(&call.ctx);
	rcu_read_unlock();
	/* bpf_pagecache_exit() in init only fills the record (see kfuncs.c). */
	if (p->record.kind)
		return p->record.code < 0 && p->record.code >= -MAX_ERRNO ? p->record.code
									  : -ECANCELED;
	if (err > 0 || err < -MAX_ERRNO)
		err = -EINVAL;
	if (err)
		pcb_exit_record(&p->record, p->name, PAGECACHE_EXIT_INIT, err, PAGECACHE_HOOK_INIT,
				"init returned an error", NULL);
	return err;
}

static int pcb_policy_attach(struct pcb_policy *p)
{
	const char *failed = "";
	int err;

	if (!(p->hooks & PCB_DECIDING_HOOKS)) {
		pcb_exit_record(&p->record, p->name, PAGECACHE_EXIT_INIT, -EINVAL,
				PAGECACHE_HOOK_INIT, "the policy has no hook",
				"define at least one besides init and exit");
		return -EINVAL;
	}
	if (pcb_policy_find(p->name))
		return -EEXIST;
	err = pcb_policy_init(p);
	if (err)
		return err;
	err = pcb_hooks_get(p->hooks, &failed);
	if (err) {
		pcb_exit_record(&p->record, p->name, PAGECACHE_EXIT_HOOK, err, PAGECACHE_HOOK_INIT,
				"a hook could not be attached", failed);
		return err;
	}
	p->seq = ++pcb_policy_seq;
	p->attached_ns = ktime_get_real_ns();
	rcu_assign_pointer(p->ops, p->kdata);
	list_add_tail_rcu(&p->list, &pcb_policies);
	pcb_tags_bind(p);
	return 0;
}

static int pcb_reg(void *kdata, struct bpf_link *link)
{
	struct pcb_policy *p;
	int err;

	/*
	 * BPF asks for CAP_BPF and CAP_PERFMON only, which tracing tools have, too.  A policy
	 * decides for all readers of its files, and gets the tags of the last one of its name.
	 */
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	p = pcb_policy_alloc(kdata);
	if (!p)
		return -ENOMEM;
	mutex_lock(&pcb_mutex);
	err = pcb_policy_attach(p);
	if (err && p->record.kind)
		pcb_exit_push(&p->record);
	mutex_unlock(&pcb_mutex);
	if (err)
		pcb_policy_put(p);
	return err;
}

static struct pcb_policy *pcb_policy_of(const void *kdata)
{
	struct pcb_policy *p;

	list_for_each_entry (p, &pcb_policies, list) {
		if (p->kdata == kdata)
			return p;
	}
	return NULL;
}

static void pcb_unreg(void *kdata, struct bpf_link *link)
{
	struct pcb_policy *p;

	mutex_lock(&pcb_mutex);
	p = pcb_policy_of(kdata);
	if (WARN_ON_ONCE(!p)) {
		mutex_unlock(&pcb_mutex);
		return;
	}
	if (!test_and_set_bit(PCB_ENDED, &p->ended)) {
		RCU_INIT_POINTER(p->ops, NULL);
		pcb_exit_record(&p->record, p->name, PAGECACHE_EXIT_DETACHED, 0,
				PAGECACHE_HOOK_EXIT, "detached", NULL);
	}
	/* After this a hook that is just ending the policy has written the exit record. */
	synchronize_rcu();
	pcb_policy_finish(p);
	list_del_rcu(&p->list);
	pcb_hooks_put(p->hooks);
	mutex_unlock(&pcb_mutex);
	/* Hooks that still see the policy or its ops run under RCU. */
	synchronize_rcu();
	pcb_policy_put(p);
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
	case offsetof(struct pagecache_ops, access_step_pages):
		to->access_step_pages = from->access_step_pages;
		return 1;
	case offsetof(struct pagecache_ops, abi_version):
		if (from->abi_version != PAGECACHE_ABI_VERSION)
			return -EPROTO;
		to->abi_version = from->abi_version;
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
	.cfi_stubs = &pcb_cfi_stubs,
	.name = "pagecache_ops",
	.owner = THIS_MODULE,
};

int pcb_struct_ops_register(void)
{
	return register_bpf_struct_ops(&pcb_struct_ops, pagecache_ops);
}
