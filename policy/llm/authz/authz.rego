# METADATA
# title: Who may do what
# description: |
#   The gateway asks for `data.llm.authz.decision` once a request. What is not granted is denied; so is everything when
#   the policy has expired, or has no date until which it holds. The answer names the models and the limits, so that one
#   decision serves whatever model the request then names.
# schemas:
#   - input: schema.input
package llm.authz

# METADATA
# description: No one may hold all of these. Roles list their duties; who enforces them stands in llm/roles.
duties_apart := {"policy:change", "audit:read"}

# METADATA
# description: The first of these that applies. `rule` names it for the audit record.
# entrypoint: true
decision := denied("policy_expired", "the policy has expired, or says no date until which it holds") if {
	not current
} else := denied("default_deny", "the request does not say who asks for what: subject, tenant, roles, action") if {
	not well_formed
} else := denied("unknown_role", listed("the policy knows no role", unknown)) if {
	unknown != set()
} else := denied("separation_of_duties", listed("one subject may not hold", duties_apart)) if {
	duties_apart - duties == set()
} else := granted if {
	granting != set()
} else := denied("default_deny", "the policy gives no role to the groups of the subject") if {
	held == set()
	count(groups) > 0
} else := denied("default_deny", "no role of the subject grants this action")

denied(rule, reason) := {"allow": false, "rule": rule, "reason": reason, "revision": revision}

granted := {
	"allow": true,
	"rule": concat("+", sort({concat("/", ["roles", role]) | some role in granting})),
	"reason": listed({false: "granted by the role", true: "granted by the roles"}[count(granting) > 1], granting),
	"revision": revision,
	"models": models,
	"max_tokens": max({data.llm.roles[role].max_tokens | some role in granting}),
	"rate_class": rate_class,
	"rate": object.remove(data.llm.rates[rate_class], ["rank"]),
	"weight": weight,
	"keep_prompts": keep_prompts,
	"experiments": sort(experiments),
	"reviews": sort(reviews),
	"roles": sort(held),
	"aliases": aliases,
	"collections": sort(collections),
	"writes": sort(writes),
	"log_prompt": true in {data.llm.roles[role].log_prompt | some role in granting},
}

# What is no date must not reach the parser: some engines stop at its error instead of saying no.
current if {
	expires := data.llm.meta.expires
	is_string(expires)
	regex.match(`^2[0-9]{3}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z$`, expires)
	time.now_ns() < time.parse_rfc3339_ns(expires)
}

default revision := 0

revision := data.llm.meta.revision

well_formed if {
	is_string(input.action)
	is_string(input.subject)
	is_string(input.tenant)
	is_array(input.roles)
	is_array(groups)
	not "" in {input.subject, input.tenant}
	every role in input.roles {
		is_string(role)
	}
	every group in groups {
		is_string(group)
	}
}

# Of the identity provider: what they give stands in the policy alone.
default groups := []

groups := input.groups

held contains role if some role in input.roles

held contains role if {
	some group in groups
	some role in data.llm.groups[group]
}

unknown contains role if {
	some role in held
	not data.llm.roles[role]
}

duties contains duty if {
	some role in held
	some duty in data.llm.roles[role].duties
}

granting contains role if {
	some role in held
	input.action in data.llm.roles[role].actions
}

models := ["*"] if "*" in named_models

models := sort(named_models) if not "*" in named_models

named_models contains model if {
	some role in granting
	some model in data.llm.roles[role].models
}

permitted(_) if "*" in named_models

permitted(model) if model in named_models

aliases[name] := alias if {
	some name, alias in data.llm.aliases
	permitted(alias.model)
	every collection in object.get(alias, "collections", []) {
		collection in collections
	}
}

# Those whose documents the subject may read, whatever route it asks.
collections contains name if {
	some name, collection in data.llm.collections
	collection.tenant == input.tenant
	some role in collection.readers
	role in held
}

# Those whose documents the subject may add, list and remove.
writes contains name if {
	some name, collection in data.llm.collections
	collection.tenant == input.tenant
	some role in collection.writers
	role in held
}

# Where two classes have one rank, the later name counts: any order, but always the same.
rate_class := class if {
	[_, class] := max({[data.llm.rates[name].rank, name] |
		some role in granting
		name := data.llm.roles[role].rate_class
	})
}

default weight := 1

weight := data.llm.tenants[input.tenant].weight

default keep_prompts := false

keep_prompts := data.llm.tenants[input.tenant].keep_prompts

# Those in which the tenant takes part; of the page about experiments, all.
experiments contains named if {
	some name, experiment in data.llm.experiments
	concerns(experiment)
	arms := object.remove(experiment, ["tenants", "metrics", "minimum", "guardrails", "changed"])
	named := object.union(arms, {"name": name, "refusals": experiment.guardrails.refusals})
}

concerns(experiment) if input.tenant in experiment.tenants

concerns(_) if input.action == "GET /operator/experiments"

# Tenants whose badly rated answers the subject's tenant reviews: those that consent, and name it.
reviews contains tenant if {
	some tenant, said in data.llm.tenants
	said.keep_prompts == true
	input.tenant in said.reviewed_by
}

listed(words, names) := concat(" ", [words, concat(" and ", sort(names))])
