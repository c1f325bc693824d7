// SPDX-License-Identifier: GPL-2.0-only
/* policy.c - the struct_ops type pagecache_ops: attachment, end, exit record. */
#include <linux/bpf.h>
#include <linux/bpf_verifier.h>
#include <linux/btf.h>
#include <linux/rculist.h>
#include <linux/slab.h>
#include <linux/static_call.h>
#include <linux/timekeeping.h>

#include "compat.h"
#include "pagecache.h"

DEFINE_MUTEX(pcb_mutex);
LIST_HEAD(pcb_policies);
static u64 pcb_policy_seq;

#define PCB_PRESSURE_LENIENCE 400 /* a worker waits for pressure, not whoever needs memory */

/* Types a policy may write to: the answer, nothing else. */
static const struct btf_type *pcb_answer_type;

static void pcb_policy_free(struct kref *ref)
{
	struct pcb_policy *p = container_of(ref, struct pcb_policy, ref);

	free_percpu(p->counters);
	kfree_rcu(p, rcu);
}

void pcb_policy_put(struct pcb_policy *p)
{
	kref_put(&p->ref, pcb_policy_free);
}

void pcb_policy_counters(struct pcb_policy *p, u64 *out)
{
	int cpu, i;

	memset(out, 0, PAGECACHE_COUNTER_NR * sizeof(*out));
	for_each_possible_cpu (cpu) {
		u64 *counters = per_cpu_ptr(p->counters, cpu);

		for (i = 0; i < PAGECACHE_COUNTER_NR; i++)
			out[i] += READ_ONCE(counters[i]);
	}
}

/* A living policy of that name.  Under pcb_mutex. */
struct pcb_policy *pcb_policy_find(const char *name)
{
	struct pcb_policy *p;

	list_for_each_entry (p, &pcb_policies, list) {
		if (!strncmp(p->name, name, sizeof(p->name)) && !test_bit(0, &p->ended))
			return p;
	}
	return NULL;
}

/* Write the record and make the policy unreachable.  Once per policy; under pcb_mutex. */
static void pcb_policy_bury(struct pcb_policy *p)
{
	pcb_tags_unbind(p);
	pcb_prefetch_cancel_policy(p);
	if (p->kdata->exit)
		p->kdata->exit(&p->record);
	pcb_exit_push(&p->record);
}

static void pcb_policy_end_work(struct work_struct *work)
{
	struct pcb_policy *p = container_of(work, struct pcb_policy, end_work);

	mutex_lock(&pcb_mutex);
	/* unreg may have been faster: then kdata is gone and the record written. */
	if (!test_and_set_bit(1, &p->ended))
		pcb_policy_bury(p);
	mutex_unlock(&pcb_mutex);
	pcb_policy_put(p);
}

static void pcb_record_init(struct pagecache_exit_record *record, const char *policy,
			    enum pagecache_exit_kind kind, s64 code, enum pagecache_hook hook,
			    const char *reason, const char *message)
{
	*record = (struct pagecache_exit_record){ .kind = kind, .code = code, .hook = hook };
	strscpy(record->policy, policy, sizeof(record->policy));
	strscpy(record->reason, reason, sizeof(record->reason));
	strscpy(record->message, message ?: "", sizeof(record->message));
}

/*
 * The policy has failed or asked to go: from here on it is not asked any more, and the
 * kernel decides by itself.  Any context; the rest is done by a work item.
 */
void pcb_policy_end(struct pcb_policy *p, enum pagecache_exit_kind kind, s64 code,
		    enum pagecache_hook hook, const char *reason, const char *message)
{
	if (test_and_set_bit(0, &p->ended))
		return;
	RCU_INIT_POINTER(p->ops, NULL);
	pcb_record_init(&p->record, p->name, kind, code, hook, reason, message);
	kref_get(&p->ref);
	queue_work(pcb_wq, &p->end_work);
}

/* An answer that makes no sense. */
void pcb_policy_invalid(struct pcb_policy *p, enum pagecache_hook hook, const char *what)
{
	pcb_count(p, invalid_answers, 1);
	if (atomic_inc_return(&p->invalid) >= pcb_max_invalid)
		pcb_policy_end(p, PAGECACHE_EXIT_INVALID, -EINVAL, hook, "too many invalid answers",
			       what);
}

/*
 * A hook that others wait for was called at @since_ns and has answered.  One call may have been
 * interrupted; an average over about 16, each counted as at most four times the bound, tells.
 */
void pcb_policy_took(struct pcb_policy *p, enum pagecache_hook hook, u64 since_ns)
{
	bool evict = hook == PAGECACHE_HOOK_EVICT;
	u64 bound = (u64)pcb_max_evict_us * NSEC_PER_USEC * (evict ? 1 : PCB_PRESSURE_LENIENCE);
	u64 *average = evict ? &p->evict_ns : &p->pressure_ns;
	u64 took = ktime_get_mono_fast_ns() - since_ns;
	u64 was = READ_ONCE(*average);

	if (took > bound)
		pcb_count(p, slow_calls, 1);
	was = was - was / 16 + min(took, 4 * bound) / 16;
	WRITE_ONCE(*average, was);
	if (was > bound)
		pcb_policy_end(p, PAGECACHE_EXIT_SLOW, -ETIME, hook,
			       "it took too long over its answers",
			       evict ? "evict: parameter max_evict_us of the module is the bound"
				     : "pressure: the bound is 400 times that of evict");
}

static u32 pcb_hooks_of(const struct pagecache_ops *ops)
{
	return (ops->init ? BIT(PAGECACHE_HOOK_INIT) : 0) |
	       (ops->exit ? BIT(PAGECACHE_HOOK_EXIT) : 0) |
	       (ops->readahead ? BIT(PAGECACHE_HOOK_READAHEAD) : 0) |
	       (ops->access ? BIT(PAGECACHE_HOOK_ACCESS) : 0) |
	       (ops->added ? BIT(PAGECACHE_HOOK_ADDED) : 0) |
	       (ops->removed ? BIT(PAGECACHE_HOOK_REMOVED) : 0) |
	       (ops->evict ? BIT(PAGECACHE_HOOK_EVICT) : 0) |
	       (ops->pressure ? BIT(PAGECACHE_HOOK_PRESSURE) : 0);
}

#define PCB_DECIDING_HOOKS                                                                        \
	(BIT(PAGECACHE_HOOK_READAHEAD) | BIT(PAGECACHE_HOOK_ACCESS) | BIT(PAGECACHE_HOOK_ADDED) | \
	 BIT(PAGECACHE_HOOK_REMOVED) | BIT(PAGECACHE_HOOK_EVICT) | BIT(PAGECACHE_HOOK_PRESSURE))

static struct pcb_policy *pcb_policy_alloc(struct pagecache_ops *ops)
{
	struct pcb_policy *p = kzalloc(sizeof(*p), GFP_KERNEL);

	if (!p)
		return NULL;
	p->counters = __alloc_percpu(PAGECACHE_COUNTER_NR * sizeof(u64), sizeof(u64));
	if (!p->counters) {
		kfree(p);
		return NULL;
	}
	kref_init(&p->ref);
	INIT_WORK(&p->end_work, pcb_policy_end_work);
	p->kdata = ops;
	p->hooks = pcb_hooks_of(ops);
	p->keep_max = pcb_max_keep_pages();
	strscpy(p->name, ops->name, sizeof(p->name));
	return p;
}

/* Its own verdict on itself, before any hook can reach it. */
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
		pcb_record_init(&p->record, p->name, PAGECACHE_EXIT_INIT, err, PAGECACHE_HOOK_INIT,
				"init returned an error", NULL);
	return err;
}

static int pcb_policy_attach(struct pcb_policy *p)
{
	const char *failed = "";
	int err;

	if (!(p->hooks & PCB_DECIDING_HOOKS)) {
		pcb_record_init(&p->record, p->name, PAGECACHE_EXIT_INIT, -EINVAL,
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
		pcb_record_init(&p->record, p->name, PAGECACHE_EXIT_HOOK, err, PAGECACHE_HOOK_INIT,
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
	struct pcb_policy *p = pcb_policy_alloc(kdata);
	int err;

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
	if (!test_and_set_bit(0, &p->ended)) {
		RCU_INIT_POINTER(p->ops, NULL);
		pcb_record_init(&p->record, p->name, PAGECACHE_EXIT_DETACHED, 0,
				PAGECACHE_HOOK_EXIT, "detached", NULL);
	}
	if (!test_and_set_bit(1, &p->ended))
		pcb_policy_bury(p);
	list_del_rcu(&p->list);
	pcb_hooks_put(p->hooks);
	mutex_unlock(&pcb_mutex);
	/* Hooks that still see the policy or its ops run under RCU. */
	synchronize_rcu();
	pcb_policy_put(p);
}

static s32 pcb_no_btf_find(const struct btf *btf, const char *name, u8 kind)
{
	return -ENOENT;
}

DEFINE_STATIC_CALL(pcb_btf_find, pcb_no_btf_find);

static int pcb_init(struct btf *btf)
{
	unsigned long addr = pcb_symbol("btf_find_by_name_kind");
	s32 id;

	if (addr)
		static_call_update(pcb_btf_find, (typeof(&pcb_no_btf_find))addr);
	id = static_call(pcb_btf_find)(btf, "pagecache_answer", BTF_KIND_STRUCT);
	if (id < 0)
		return id;
	pcb_answer_type = btf_type_by_id(btf, id);
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

int pcb_policy_register(void)
{
	return register_bpf_struct_ops(&pcb_struct_ops, pagecache_ops);
}
