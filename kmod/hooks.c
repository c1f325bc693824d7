// SPDX-License-Identifier: GPL-2.0-only
/*
 * hooks.c - hooks are on while somebody needs them: a module without a policy costs nothing.
 */
#include "hooks.h"
#include "policy.h"

static struct pcb_hook_family *const pcb_families[] = {
	&pcb_readahead_hooks, &pcb_access_hooks,   &pcb_cache_hooks, &pcb_umount_hooks,
	&pcb_evict_hooks,     &pcb_pressure_hooks, &pcb_super_hooks,
};

int pcb_hooks_prepare(void)
{
	int i, err;

	for (i = 0; i < ARRAY_SIZE(pcb_families); i++) {
		err = pcb_families[i]->prepare();
		if (err) {
			pr_err("hook %s: not on this kernel (%d)\n", pcb_families[i]->name, err);
			while (i--)
				pcb_families[i]->release();
			return err;
		}
	}
	return 0;
}

void pcb_hooks_release(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(pcb_families); i++)
		pcb_families[i]->release();
}

static bool pcb_family_wanted(const struct pcb_hook_family *family, u32 wanted)
{
	return family->hooks & wanted;
}

static void pcb_families_put(u32 wanted, int count)
{
	struct pcb_hook_family *family;

	lockdep_assert_held(&pcb_mutex);
	while (count--) {
		family = pcb_families[count];
		if (pcb_family_wanted(family, wanted) && !--family->users)
			family->off();
	}
}

/* On failure *failed is a sentence that names the hook and why; nothing stays on. */
int pcb_hooks_get(u32 wanted, const char **failed)
{
	struct pcb_hook_family *family;
	int i, err;

	lockdep_assert_held(&pcb_mutex);
	if (!pcb_ftrace_works()) {
		*failed = "ftrace is off: sysctl kernel.ftrace_enabled=1 turns it on";
		return -EBUSY;
	}
	for (i = 0; i < ARRAY_SIZE(pcb_families); i++) {
		family = pcb_families[i];
		if (!pcb_family_wanted(family, wanted))
			continue;
		err = family->users ? 0 : family->on(failed);
		if (err) {
			pr_err("hook %s: %s (%d)\n", family->name, *failed, err);
			pcb_families_put(wanted, i);
			return err;
		}
		family->users++;
	}
	return 0;
}

void pcb_hooks_put(u32 wanted)
{
	lockdep_assert_held(&pcb_mutex);
	pcb_families_put(wanted, ARRAY_SIZE(pcb_families));
}

/* Turns a family of hooks on that the module itself needs, whatever policies are attached. */
int pcb_hooks_hold_family(struct pcb_hook_family *family)
{
	const char *failed = "";
	int err;

	lockdep_assert_held(&pcb_mutex);
	err = family->users ? 0 : family->on(&failed);
	if (err)
		pr_err("hook %s: %s (%d)\n", family->name, failed, err);
	else
		family->users++;
	return err;
}

void pcb_hooks_release_family(struct pcb_hook_family *family)
{
	lockdep_assert_held(&pcb_mutex);
	if (!--family->users)
		family->off();
}

u32 pcb_hooks_available(void)
{
	return BIT(PAGECACHE_HOOK_INIT) | BIT(PAGECACHE_HOOK_EXIT) | BIT(PAGECACHE_HOOK_READAHEAD) |
	       BIT(PAGECACHE_HOOK_ACCESS) | BIT(PAGECACHE_HOOK_ADDED) |
	       BIT(PAGECACHE_HOOK_REMOVED) | (pcb_evict_possible ? BIT(PAGECACHE_HOOK_EVICT) : 0) |
	       (pcb_pressure_possible ? BIT(PAGECACHE_HOOK_PRESSURE) : 0);
}
