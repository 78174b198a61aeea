# The mechanism, on roles of its own: what the shipped roles may do stands in llm/roles/roles_test.rego.
package llm.authz_test

import data.llm.authz

meta := {"revision": 7, "expires": "2030-01-01T00:00:00Z"}

before := time.parse_rfc3339_ns("2029-12-31T23:59:59Z")

after := time.parse_rfc3339_ns("2030-01-01T00:00:00Z")

rates := {
	"slow": {"rank": 1, "priority": 1, "requests_per_minute": 6},
	"fast": {"rank": 2, "priority": 5, "requests_per_minute": 60},
}

roles := {
	"reader": role(["GET /generate"], ["*"], 256, "slow", false, []),
	"writer": role(["POST /generate", "GET /v1/models"], ["small"], 100, "fast", false, []),
	"recorded": role(["POST /generate"], ["large", "small"], 50, "slow", true, []),
	"changer": role(["GET /v1/models"], ["*"], 0, "slow", false, ["policy:change"]),
	"looker": role(["GET /v1/models"], ["*"], 0, "slow", false, ["audit:read"]),
	"owner": role(["GET /operator/experiments"], ["*"], 0, "slow", false, []),
	"rateless": role(["GET /generate"], ["*"], 256, "gone", false, []),
}

role(actions, models, max_tokens, rate_class, log_prompt, duties) := {
	"actions": actions,
	"models": models,
	"max_tokens": max_tokens,
	"rate_class": rate_class,
	"log_prompt": log_prompt,
	"duties": duties,
}

asks(names, action) := {"subject": "alice@corp", "tenant": "corp", "roles": names, "action": action}

decided(question) := with_data(question, {}, {})

with_data(question, group_data, alias_data) := decision if {
	decision := authz.decision with input as question
		with data.llm.roles as roles
		with data.llm.rates as rates
		with data.llm.groups as group_data
		with data.llm.aliases as alias_data
		with data.llm.meta as meta
		with time.now_ns as before
}

test_a_role_grants_its_actions_with_its_limits if {
	decided(asks(["reader"], "GET /generate")) == {
		"allow": true,
		"rule": "roles/reader",
		"reason": "granted by the role reader",
		"revision": 7,
		"models": ["*"],
		"max_tokens": 256,
		"rate_class": "slow",
		"rate": {"priority": 1, "requests_per_minute": 6},
		"weight": 1,
		"keep_prompts": false,
		"experiments": [],
		"reviews": [],
		"roles": ["reader"],
		"aliases": {},
		"collections": [],
		"writes": [],
		"log_prompt": false,
	}
}

test_two_roles_that_grant_it_give_the_wider_of_each_limit if {
	decided(asks(["writer", "recorded"], "POST /generate")) == {
		"allow": true,
		"rule": "roles/recorded+roles/writer",
		"reason": "granted by the roles recorded and writer",
		"revision": 7,
		"models": ["large", "small"],
		"max_tokens": 100,
		"rate_class": "fast",
		"rate": {"priority": 5, "requests_per_minute": 60},
		"weight": 1,
		"keep_prompts": false,
		"experiments": [],
		"reviews": [],
		"roles": ["recorded", "writer"],
		"aliases": {},
		"collections": [],
		"writes": [],
		"log_prompt": true,
	}
}

test_a_tenant_has_the_weight_that_the_data_gives_it if {
	decision := decided(asks(["reader"], "GET /generate")) with data.llm.tenants as {"corp": {"weight": 3}}
	decision.weight == 3
	other := decided(asks(["reader"], "GET /generate")) with data.llm.tenants as {"other": {"weight": 3}}
	other.weight == 1
}

test_the_prompts_of_a_tenant_are_kept_where_the_data_says_so_alone if {
	kept := decided(asks(["reader"], "GET /generate")) with data.llm.tenants as {"corp": {"keep_prompts": true}}
	kept.keep_prompts == true
	other := decided(asks(["reader"], "GET /generate")) with data.llm.tenants as {"other": {"keep_prompts": true}}
	other.keep_prompts == false
}

test_a_tenant_takes_part_in_the_experiments_that_name_it_alone if {
	arms := {"model": "large", "control": "large-1", "candidate": "large-2", "unit": "subject", "percent": 5, "salt": "s"}
	guarded := {"guardrails": {"slow": 0.01, "refusals": ["no"]}, "minimum": 30, "metrics": [], "changed": {}}
	running := {
		"one": object.union(arms, object.union(guarded, {"tenants": ["corp"]})),
		"two": object.union(arms, {"tenants": ["other"]}),
	}
	decision := decided(asks(["reader"], "GET /generate")) with data.llm.experiments as running
	decision.experiments == [object.union(arms, {"name": "one", "refusals": ["no"]})]
	denied := decided(asks(["reader"], "POST /generate")) with data.llm.experiments as running
	not denied.experiments
}

test_the_page_about_experiments_has_those_of_all_tenants if {
	guardrails := {"refusals": []}
	running := {
		"one": {"tenants": ["corp"], "guardrails": guardrails},
		"two": {"tenants": ["other"], "guardrails": guardrails},
	}
	decision := decided(asks(["owner"], "GET /operator/experiments")) with data.llm.experiments as running
	[each.name | some each in decision.experiments] == ["one", "two"]
}

test_answers_are_reviewed_of_tenants_that_consent_and_name_the_subjects_tenant if {
	tenants := {
		"corp": {"keep_prompts": true},
		"willing": {"keep_prompts": true, "reviewed_by": ["corp", "else"]},
		"revoked": {"keep_prompts": false, "reviewed_by": ["corp"]},
		"silent": {"reviewed_by": ["corp"]},
		"other": {"keep_prompts": true, "reviewed_by": ["other"]},
	}
	decision := decided(asks(["reader"], "GET /generate")) with data.llm.tenants as tenants
	decision.reviews == ["willing"]
}

test_an_experiment_grants_no_model_by_name if {
	running := {"one": {"model": "small", "control": "small", "candidate": "large", "tenants": ["corp"]}}
	decision := decided(asks(["writer"], "POST /generate")) with data.llm.experiments as running
	decision.models == ["small"]
}

test_only_roles_that_grant_the_action_count if {
	decision := decided(asks(["reader", "writer", "recorded"], "GET /generate"))
	decision.rule == "roles/reader"
	decision.rate_class == "slow"
	decision.log_prompt == false
}

test_all_models_of_one_role_are_all_models if {
	decided(asks(["writer", "changer"], "GET /v1/models")).models == ["*"]
}

test_the_order_and_number_of_roles_make_no_difference if {
	one := decided(asks(["writer", "recorded"], "POST /generate"))
	one == decided(asks(["recorded", "writer", "recorded"], "POST /generate"))
}

aliases := {"default": {"model": "large"}, "tiny": {"model": "small", "deprecated": "2026-11-01"}}

collections := {
	"handbook": {"tenant": "corp", "readers": ["reader", "writer"]},
	"payroll": {"tenant": "corp", "readers": ["recorded"]},
	"theirs": {"tenant": "other", "readers": ["reader", "writer", "recorded"]},
}

test_a_subject_reads_the_collections_of_its_tenant_that_name_a_role_of_its if {
	reader := decided(asks(["reader"], "GET /generate")) with data.llm.collections as collections
	reader.collections == ["handbook"]
	both := decided(asks(["writer", "recorded"], "POST /generate")) with data.llm.collections as collections
	both.collections == ["handbook", "payroll"]
}

test_a_subject_of_another_tenant_reads_none_of_them if {
	question := object.union(asks(["reader", "writer", "recorded"], "GET /generate"), {"tenant": "third"})
	decision := decided(question) with data.llm.collections as collections
	decision.collections == []
}

test_a_subject_writes_the_collections_of_its_tenant_that_name_a_role_of_its_as_writer if {
	written := {
		"handbook": {"tenant": "corp", "readers": ["reader"], "writers": ["writer"]},
		"payroll": {"tenant": "corp", "readers": ["writer"]},
		"theirs": {"tenant": "other", "readers": ["writer"], "writers": ["writer"]},
	}
	writer := decided(asks(["writer"], "POST /generate")) with data.llm.collections as written
	writer.writes == ["handbook"]
	writer.collections == ["payroll"]
	reader := decided(asks(["reader"], "GET /generate")) with data.llm.collections as written
	reader.writes == []
	reader.collections == ["handbook"]
}

test_a_subject_has_the_aliases_of_models_that_it_may_use if {
	decision := with_data(asks(["writer"], "POST /generate"), {}, aliases)
	decision.aliases == {"tiny": {"model": "small", "deprecated": "2026-11-01"}}
	every_one := with_data(asks(["reader"], "GET /generate"), {}, aliases)
	every_one.aliases == aliases
}

test_a_subject_has_the_aliases_of_collections_that_it_reads_all_of if {
	answering := {
		"handbook-assistant": {"model": "small", "collections": ["handbook"]},
		"both": {"model": "small", "collections": ["handbook", "payroll"]},
		"theirs": {"model": "small", "collections": ["theirs"]},
		"lost": {"model": "small", "collections": ["nothing"]},
	}
	reader := with_data(asks(["writer"], "POST /generate"), {}, answering) with data.llm.collections as collections
	object.keys(reader.aliases) == {"handbook-assistant"}
	reader.aliases["handbook-assistant"].collections == ["handbook"]
	question := asks(["writer", "recorded"], "POST /generate")
	both := with_data(question, {}, answering) with data.llm.collections as collections
	object.keys(both.aliases) == {"both", "handbook-assistant"}
}

test_an_alias_grants_no_model if {
	decision := with_data(asks(["writer"], "POST /generate"), {}, {"small": {"model": "large"}})
	decision.models == ["small"]
	decision.aliases == {}
}

groups := {"staff": ["reader"], "/dev/leads": ["writer", "recorded"], "looks": ["looker"]}

of_groups(names, action) := with_data(object.union(asks([], action), {"groups": names}), groups, {})

test_the_roles_of_a_group_are_those_that_the_policy_gives_it if {
	of_groups(["staff"], "GET /generate").roles == ["reader"]
	decision := of_groups(["staff", "/dev/leads"], "POST /generate")
	decision.rule == "roles/recorded+roles/writer"
	decision.roles == ["reader", "recorded", "writer"]
}

test_a_group_that_the_policy_does_not_name_gives_nothing if {
	of_groups(["staff", "reader", "root"], "GET /generate").roles == ["reader"]
	decided(object.union(asks([], "GET /generate"), {"groups": ["staff"]})).rule == "default_deny"
	every names in [["reader"], ["Staff"], ["staff "], ["leads"], ["*"], [""], []] {
		decision := of_groups(names, "GET /generate")
		decision.rule == "default_deny"
		decision.allow == false
	}
}

test_a_subject_whose_groups_have_no_role_is_told_so if {
	of_groups(["guests"], "GET /generate").reason == "the policy gives no role to the groups of the subject"
}

test_duties_of_groups_and_roles_are_kept_apart_together if {
	question := object.union(asks(["changer"], "GET /v1/models"), {"groups": ["looks"]})
	decision := with_data(question, groups, {})
	decision.rule == "separation_of_duties"
}

test_groups_of_another_shape_are_denied if {
	every names in [null, "staff", {"0": "staff"}, ["staff", 1], [["staff"]], 7] {
		decision := of_groups(names, "GET /generate")
		startswith(decision.reason, "the request does not say who asks for what")
	}
}

test_what_no_role_grants_is_denied if {
	decided(asks(["reader"], "POST /generate")) == {
		"allow": false,
		"rule": "default_deny",
		"reason": "no role of the subject grants this action",
		"revision": 7,
	}
}

test_a_subject_without_roles_is_denied if decided(asks([], "GET /generate")).rule == "default_deny"

test_an_action_is_compared_whole if {
	every action in ["get /generate", "GET /generate ", "GET /generate/", "GET", "", "*", "GET /v1/models/small"] {
		not decided(asks(["reader", "writer"], action)).allow
	}
}

test_an_unknown_role_denies_what_another_role_grants if {
	decision := decided(asks(["reader", "root"], "GET /generate"))
	decision.rule == "unknown_role"
	decision.reason == "the policy knows no role root"
	decision.allow == false
}

test_a_subject_may_not_change_policy_and_read_the_audit_record if {
	every action in ["GET /v1/models", "GET /generate", "DELETE /"] {
		decision := decided(asks(["changer", "looker", "reader"], action))
		decision.rule == "separation_of_duties"
		decision.reason == "one subject may not hold audit:read and policy:change"
		decision.allow == false
	}
}

test_either_duty_alone_is_no_offence if {
	decided(asks(["changer", "reader"], "GET /generate")).allow
	decided(asks(["looker", "reader"], "GET /generate")).allow
}

test_a_role_whose_rate_class_is_gone_grants_nothing if {
	decided(asks(["rateless"], "GET /generate")).rule == "default_deny"
}

malformed contains object.remove(asks(["reader"], "GET /generate"), [key]) if {
	some key in ["subject", "tenant", "roles", "action"]
}

malformed contains object.union(asks(["reader"], "GET /generate"), {key: value}) if {
	some key in ["subject", "tenant", "roles", "action"]
	some value in [null, true, 0, {}, {"0": "reader"}, [["reader"]], [null], ["reader", 1]]
}

malformed contains object.union(asks(["reader"], "GET /generate"), {key: ""}) if {
	some key in ["subject", "tenant", "roles"]
}

malformed contains ["reader"]

malformed contains null

test_a_question_of_another_shape_is_denied if {
	count(malformed) > 30
	every question in malformed {
		decision := decided(question)
		decision.rule == "default_deny"
		decision.allow == false
		startswith(decision.reason, "the request does not say who asks for what")
	}
}

test_a_policy_that_has_expired_denies_everything if {
	decision := authz.decision with input as asks(["reader"], "GET /generate")
		with data.llm.roles as roles
		with data.llm.rates as rates
		with data.llm.meta as meta
		with time.now_ns as after
	decision.rule == "policy_expired"
	decision.revision == 7
	decision.allow == false
}

test_a_policy_without_a_date_counts_as_expired if {
	decision := authz.decision with input as asks(["reader"], "GET /generate")
		with data.llm.roles as roles
		with data.llm.rates as rates
		with data.llm.meta as {}
	decision == {
		"allow": false,
		"rule": "policy_expired",
		"reason": "the policy has expired, or says no date until which it holds",
		"revision": 0,
	}
}

test_a_date_that_cannot_be_read_counts_as_expired if {
	every date in ["tomorrow", "", 4102444800, null] {
		decision := authz.decision with input as asks(["reader"], "GET /generate")
			with data.llm.roles as roles
			with data.llm.rates as rates
			with data.llm.meta as {"revision": 7, "expires": date}
		decision.rule == "policy_expired"
	}
}
