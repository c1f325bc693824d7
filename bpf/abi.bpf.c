// SPDX-License-Identifier: GPL-2.0-only
/* abi.bpf.c - one variable per ABI type, so that the compiler writes it into BTF. */
#include "kernel.bpf.h"
#include "pagecache_ops.h"

struct pagecache_ctx abi_ctx;
struct pagecache_answer abi_answer;
struct pagecache_pressure abi_pressure;
struct pagecache_exit_record abi_exit_record;
struct pagecache_info abi_info;
struct pagecache_tag_request abi_tag_request;
struct pagecache_untag_request abi_untag_request;
struct pagecache_lend_request abi_lend_request;
struct pagecache_file_extent abi_file_extent;
struct pagecache_tag_record abi_tag_record;
struct pagecache_policy_record abi_policy_record;
struct pagecache_ops abi_ops;
struct pagecache_request abi_request;
struct pagecache_agent_tag abi_agent_tag;
struct pagecache_agent_state abi_agent_state;
struct pagecache_agent_orders abi_agent_orders;
struct pagecache_template_file abi_template_file;
struct pagecache_template_model abi_template_model;
struct pagecache_template_consumer abi_template_consumer;
struct pagecache_template_target abi_template_target;
struct pagecache_template_span abi_template_span;
struct pagecache_template_entry abi_template_entry;
struct pagecache_template_step abi_template_step;
struct pagecache_template_extent abi_template_extent;
enum pagecache_template_source abi_template_source;
struct pagecache_agent_pressure abi_agent_pressure;
struct pagecache_file_question abi_file_question;
struct pagecache_observed_file abi_observed_file;
struct pagecache_observed_key abi_observed_key;
struct pagecache_observed_value abi_observed_value;
struct pagecache_observed_move abi_observed_move;
struct pagecache_observer_state abi_observer_state;
struct pagecache_recorded_key abi_recorded_key;
struct pagecache_recorded_value abi_recorded_value;
enum pagecache_request_kind abi_request_kind;
enum pagecache_hook abi_hook;
enum pagecache_verdict abi_verdict;
enum pagecache_eviction abi_eviction;
enum pagecache_kind abi_kind;
enum pagecache_exit_kind abi_exit_kind;
enum pagecache_counter abi_counter;
enum pagecache_observed_counter abi_observed_counter;
enum pagecache_recorded_counter abi_recorded_counter;
