package llm.validate_test

import data.llm.validate

role := {
	"actions": ["GET /generate"],
	"models": ["*"],
	"max_tokens": 256,
	"rate_class": "slow",
	"log_prompt": false,
	"duties": [],
}

rate := {"rank": 1, "priority": 5, "requests_per_minute": 6, "tokens_per_minute": 600, "tokens_per_day": 6000}

# The problems of a role `reader` and a rate class `slow`, changed by these patches.
problems(role_patch, rate_patch) := with_aliases(role_patch, rate_patch, {})

# The problems of these aliases, beside these collections.
answering(aliases, collections) := found if {
	found := validate.problems with data.llm.roles as {"reader": role}
		with data.llm.rates as {"slow": rate}
		with data.llm.groups as {}
		with data.llm.aliases as aliases
		with data.llm.collections as collections
}

with_aliases(role_patch, rate_patch, aliases) := found if {
	found := validate.problems with data.llm.roles as {"reader": object.union(role, role_patch)}
		with data.llm.rates as {"slow": object.union(rate, rate_patch)}
		with data.llm.groups as {}
		with data.llm.aliases as aliases
		with data.llm.collections as {}
}

# The problems of these collections, beside the role `reader`.
collected(collections) := found if {
	found := validate.problems with data.llm.roles as {"reader": role}
		with data.llm.rates as {"slow": rate}
		with data.llm.groups as {}
		with data.llm.aliases as {}
		with data.llm.collections as collections
}

test_a_collection_belongs_to_a_tenant_and_names_roles_that_there_are if {
	collected({"handbook": {"tenant": "corp", "readers": ["reader"]}}) == set()
	unknown := collected({"handbook": {"tenant": "corp", "readers": ["auditor"]}})
	unknown == {"llm/collections: handbook: llm/roles has no role auditor"}
	collected({"handbook": {"tenant": "corp", "readers": ["reader"], "writers": ["reader"]}}) == set()
	writer := collected({"handbook": {"tenant": "corp", "readers": ["reader"], "writers": ["auditor"]}})
	writer == unknown
}

test_a_collection_of_the_wrong_kind_is_named if {
	every wrong in [
		{"handbook": {"readers": ["reader"]}},
		{"handbook": {"tenant": "corp"}},
		{"handbook": {"tenant": "", "readers": ["reader"]}},
		{"handbook": {"tenant": "corp", "readers": []}},
		{"handbook": {"tenant": "corp", "readers": ["reader"], "writers": []}},
		{"handbook": {"tenant": "corp", "readers": ["reader"], "owners": ["reader"]}},
		{"Hand Book": {"tenant": "corp", "readers": ["reader"]}},
		["handbook"],
	] {
		some problem in collected(wrong)
		startswith(problem, "llm/collections: ")
	}
}

test_what_is_right_has_no_problems if problems({}, {}) == set()

test_a_value_of_the_wrong_kind_is_named_with_its_place if {
	every patch in [
		{"actions": ["GET /nowhere"]},
		{"actions": ["GET /generate", "GET /generate"]},
		{"actions": "GET /generate"},
		{"actions": {"GET /generate": true}},
		{"models": []},
		{"models": [""]},
		{"max_tokens": -1},
		{"max_tokens": 1.5},
		{"max_tokens": "256"},
		{"log_prompt": "yes"},
		{"duties": null},
		{"more": 1},
	] {
		found := problems(patch, {})
		count(found) > 0
		every problem in found {
			contains(problem, "llm/roles: ")
			some key, _ in patch
			contains(problem, key)
		}
	}
}

test_a_rate_of_the_wrong_kind_is_named_with_its_place if {
	every patch in [{"rank": 0}, {"tokens_per_day": "many"}, {"requests_per_minute": 0}, {"priority": 10}, {"more": 1}] {
		some problem in problems({}, patch)
		contains(problem, "llm/rates: ")
	}
}

test_a_weight_of_the_wrong_kind_is_named_with_its_tenant if {
	every weight in [0, -1, 101, 1.5, "2", null] {
		found := problems({}, {}) with data.llm.tenants as {"corp": {"weight": weight}}
		some problem in found
		startswith(problem, "llm/tenants: corp")
	}
}

test_consent_of_the_wrong_kind_is_named_with_its_tenant if {
	every consent in [{"keep_prompts": 1}, {"keep_prompts": "yes"}, {"keep_prompt": true}, {}] {
		found := problems({}, {}) with data.llm.tenants as {"corp": consent}
		some problem in found
		startswith(problem, "llm/tenants: corp")
	}
}

test_what_is_reviewed_is_kept_and_by_tenants_that_are_named if {
	kept := {"keep_prompts": true}
	problems({}, {}) == set() with data.llm.tenants as {"corp": object.union(kept, {"reviewed_by": ["quality"]})}
	every reviewers in [[], "quality", [""], ["a", "a"], null] {
		found := problems({}, {}) with data.llm.tenants as {"corp": object.union(kept, {"reviewed_by": reviewers})}
		some problem in found
		startswith(problem, "llm/tenants: corp")
	}
	every unkept in [{}, {"keep_prompts": false}] {
		found := problems({}, {}) with data.llm.tenants as {"corp": object.union(unkept, {"reviewed_by": ["quality"]})}
		found == {"llm/tenants: corp: its prompts are not kept, so there is nothing to review"}
	}
}

test_the_largest_weight_is_accepted if {
	problems({}, {}) == set() with data.llm.tenants as {"corp": {"weight": 100}}
}

experiment := {
	"model": "large",
	"control": "large-1",
	"candidate": "large-2",
	"unit": "subject",
	"tenants": ["corp"],
	"percent": 5,
	"salt": "0123456789abcdef",
	"shadow": 0,
	"minimum": 50,
	"metrics": {"thumb": "higher", "corrected": "lower"},
	"guardrails": guardrails,
	"changed": {"by": "ada", "at": "2026-11-28T06:00:00Z", "what": "start at 5 %", "reason": "release 8"},
}

guardrails := {
	"slow_seconds": 5,
	"slow": 0.01,
	"failed": 0.01,
	"refused": 0.02,
	"length": 0.5,
	"refusals": ["I cannot"],
}

# The problems of these experiments.
experimenting(experiments) := found if {
	found := problems({}, {}) with data.llm.experiments as experiments
}

test_experiments_that_part_tenants_or_models_are_accepted if {
	experimenting({}) == set()
	experimenting({
		"one": experiment,
		"2-two": object.union(experiment, {"tenants": ["other"], "percent": 100, "unit": "request"}),
		"three": object.union(experiment, {"model": "small", "percent": 0}),
	}) == set()
}

test_a_fault_of_an_experiment_is_named_with_its_place if {
	every patch in [
		{"percent": 101},
		{"percent": -1},
		{"percent": 0.5},
		{"percent": "5"},
		{"unit": "conversation"},
		{"tenants": []},
		{"tenants": "corp"},
		{"candidate": ""},
		{"salt": "short"},
		{"more": 1},
		{"minimum": 29},
		{"shadow": 101},
		{"metrics": []},
		{"changed": object.union(experiment.changed, {"at": "today"})},
	] {
		found := experimenting({"one": object.union(experiment, patch)})
		count(found) > 0
		every problem in found {
			startswith(problem, "llm/experiments: one")
			some key, _ in patch
			contains(problem, key)
		}
	}
}

test_the_metrics_of_an_experiment_are_two if {
	three := {"a": "lower", "b": "lower", "c": "lower"}
	every metrics in [{"thumb": "higher"}, {"thumb": "higher", "stars": "more"}, three] {
		experimenting({"one": object.union(object.remove(experiment, ["metrics"]), {"metrics": metrics})}) != set()
	}
}

test_a_guardrail_that_halts_an_equal_candidate_or_none_at_all_is_named if {
	every patch in [
		{"slow": 0},
		{"failed": 0.6},
		{"refused": "0.02"},
		{"length": 0},
		{"slow_seconds": 301},
		{"refusals": ["I"]},
		{"more": 1},
	] {
		changed := {"guardrails": object.union(guardrails, patch)}
		some problem in experimenting({"one": object.union(experiment, changed)})
		some key, _ in patch
		contains(problem, key)
	}
}

test_an_experiment_that_lacks_a_field_is_named if {
	every key, _ in experiment {
		some problem in experimenting({"one": object.remove(experiment, [key])})
		contains(problem, key)
	}
}

test_the_name_of_an_experiment_is_small_letters_digits_and_hyphens if {
	every name in ["", "One", "a b", "a_b", "-a", "ä"] {
		some problem in experimenting({name: experiment})
		startswith(problem, "llm/experiments: ")
	}
}

test_one_model_has_one_experiment_for_a_tenant if {
	other := object.union(experiment, {"tenants": ["other", "corp"], "candidate": "large-3"})
	experimenting({"one": experiment, "two": other}) == {"llm/experiments: one and two both ask corp about large"}
}

test_the_arms_of_an_experiment_are_two if {
	same := object.union(experiment, {"candidate": "large-1"})
	experimenting({"one": same}) == {"llm/experiments: one: both arms are large-1, name two models"}
}

# The problems of these aliases, beside the experiment `one` about `large`.
aliased(aliases) := found if {
	found := with_aliases({}, {}, aliases) with data.llm.experiments as {"one": experiment}
}

test_aliases_lead_to_models_and_to_what_experiments_are_about if {
	aliased({}) == set()
	retired := {"model": "large", "deprecated": "2026-11-01", "sunset": "2027-02-28"}
	aliased({"default": {"model": "small"}, "meta/large-0.5": retired}) == set()
}

test_an_alias_answers_from_collections_that_there_are if {
	alias := {"ask": {"model": "small", "collections": ["handbook"]}}
	answering(alias, {"handbook": {"tenant": "corp", "readers": ["reader"]}}) == set()
	answering(alias, {}) == {"llm/aliases: ask: llm/collections has no handbook"}
}

test_a_fault_of_an_alias_is_named_with_its_place if {
	every alias in [
		"small",
		{},
		{"model": ""},
		{"model": "two words"},
		{"model": ["small"]},
		{"model": "small", "deprecated": "today"},
		{"model": "small", "deprecated": "2026-02-30"},
		{"model": "small", "deprecated": 20261101},
		{"model": "small", "deprecated": "2026-11-01", "sunset": "2027-13-01"},
		{"model": "small", "more": 1},
		{"model": "small", "collections": []},
		{"model": "small", "collections": "handbook"},
		{"model": "small", "collections": ["handbook", "handbook"]},
		{"model": "small", "collections": [1]},
	] {
		found := aliased({"default": alias})
		count(found) > 0
		every problem in found {
			startswith(problem, "llm/aliases: default")
		}
	}
	every name in ["", "two words", "-a", "a\n", "*", "ä"] {
		some problem in aliased({name: {"model": "small"}})
		startswith(problem, "llm/aliases: ")
	}
	every nothing in [[], "default", null, 1, false] {
		count(aliased(nothing)) > 0
	}
}

test_an_alias_leads_to_no_other_and_so_to_no_circle if {
	aliased({"a": {"model": "a"}}) == {"llm/aliases: a leads to a, an alias: name a model that is served"}
	aliased({"a": {"model": "b"}, "b": {"model": "a"}}) == {
		"llm/aliases: a leads to b, an alias: name a model that is served",
		"llm/aliases: b leads to a, an alias: name a model that is served",
	}
	aliased({"a": {"model": "b"}, "b": {"model": "small"}}) == {concat(" ", [
		"llm/aliases: a leads to b,",
		"an alias: name a model that is served",
	])}
}

test_an_alias_has_the_name_of_no_model_that_the_policy_names if {
	every name in ["large", "large-1", "large-2"] {
		aliased({name: {"model": "small"}}) == {sprintf("llm/aliases: %s is a model of the experiment one, too", [name])}
	}
	found := with_aliases({"models": ["small", "default"]}, {}, {"default": {"model": "small"}})
	found == {"llm/roles: reader: default is an alias, which grants nothing: name the model small"}
}

test_a_name_has_no_sunset_before_it_is_deprecated if {
	early := {"model": "small", "deprecated": "2026-11-02", "sunset": "2026-11-01"}
	aliased({"tiny": early}) == {"llm/aliases: tiny: its sunset 2026-11-01 is before 2026-11-02, when it is deprecated"}
	aliased({"tiny": {"model": "small", "sunset": "2026-11-01"}}) == {concat(" ", [
		"llm/aliases: tiny: it has a sunset and is not deprecated:",
		"add the day since when it is",
	])}
}

# The problems of these groups.
grouped(groups) := found if {
	found := validate.problems with data.llm.roles as {
		"reader": role,
		"changer": object.union(role, {"duties": ["policy:change"]}),
		"looker": object.union(role, {"duties": ["audit:read"]}),
	}
		with data.llm.rates as {"slow": rate}
		with data.llm.groups as groups
		with data.llm.aliases as {}
		with data.llm.collections as {}
}

test_a_group_has_any_name_and_roles_that_there_are if {
	grouped({}) == set()
	grouped({"staff": ["reader"], "CN=LLM Users,OU=Groups": ["reader", "looker"], "/部门/研发": ["reader"]}) == set()
	grouped({"staff": ["reader", "root"]}) == {"llm/groups: staff: llm/roles has no role root"}
}

test_a_fault_of_a_group_is_named_with_its_place if {
	grouped({"": ["reader"]}) != set()
	every names in [[], "reader", ["reader", "reader"], {"reader": true}, null, [1], [""]] {
		found := grouped({"staff": names})
		count(found) > 0
		every problem in found {
			startswith(problem, "llm/groups: staff")
		}
	}
	every nothing in [[], "staff", null, 1, false] {
		count(grouped(nothing)) > 0
	}
}

test_no_group_holds_duties_that_are_kept_apart if {
	grouped({"all": ["looker", "changer"]}) == {concat(" ", [
		"llm/groups: all: one subject may not hold audit:read and policy:change:",
		"its members would be denied everything",
	])}
}

test_a_role_that_lacks_a_limit_is_named if {
	every key, _ in role {
		found := validate.problems with data.llm.roles as {"reader": object.remove(role, [key])}
			with data.llm.rates as {"slow": rate}
			with data.llm.groups as {}
			with data.llm.aliases as {}
			with data.llm.collections as {}
		some problem in found
		contains(problem, key)
	}
}

test_a_role_needs_a_rate_class_that_there_is if {
	problems({"rate_class": "fast"}, {}) == {"llm/roles: reader: llm/rates has no class fast"}
}

test_a_role_may_not_hold_duties_that_are_kept_apart if {
	problems({"duties": ["policy:change"]}, {}) == set()
	problems({"duties": ["policy:change", "audit:read", "other"]}, {}) == {concat("", [
		"llm/roles: reader: one role may not ",
		"hold audit:read and policy:change",
	])}
}

test_all_models_stands_alone if {
	problems({"models": ["*", "small"]}, {}) == {"llm/roles: reader: \"*\" is all models, name no others beside it"}
}

test_two_rate_classes_have_two_ranks if {
	found := validate.problems with data.llm.roles as {"reader": role}
		with data.llm.rates as {"slow": rate, "slower": rate}
		with data.llm.groups as {}
		with data.llm.aliases as {}
		with data.llm.collections as {}
	found == {"llm/rates: slow and slower: two classes have the rank 1"}
}

test_a_name_is_a_plain_word if {
	every name in ["", "Reader", "a b", "roles/x", "a+b", "Ä"] {
		found := validate.problems with data.llm.roles as {name: role}
			with data.llm.rates as {"slow": rate}
			with data.llm.groups as {}
			with data.llm.aliases as {}
			with data.llm.collections as {}
		count(found) > 0
	}
}

test_what_is_no_data_is_a_problem if {
	every nothing in [false, null, [], "roles", 1] {
		found := validate.problems with data.llm.roles as nothing
			with data.llm.rates as nothing
			with data.llm.groups as {}
			with data.llm.aliases as {}
			with data.llm.collections as {}
		found == {"llm/roles: there are no roles", "llm/rates: there are no rate classes"}
	}
}

test_data_without_entries_is_a_problem if {
	found := validate.problems with data.llm.roles as {}
		with data.llm.rates as {}
		with data.llm.groups as {}
		with data.llm.aliases as {}
		with data.llm.collections as {}
	count(found) == 2
}
