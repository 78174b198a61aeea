# METADATA
# title: What is wrong with roles, rates, groups, tenants, aliases, collections and experiments
# description: |
#   `llmkeep policy build` signs nothing while `data.llm.validate.problems` has an entry. Each is a sentence that names
#   the place.
package llm.validate

import data.llm.authz

# METADATA
# description: What a role can grant; each is a route of the gateway, or a page that llm-web serves.
actions := {
	"DELETE /v1/collections/*",
	"DELETE /v1/feedback",
	"GET /generate",
	"GET /openapi.json",
	"GET /operator/*",
	"GET /operator/experiments",
	"GET /operator/reviews",
	"GET /v1/collections",
	"GET /v1/collections/*",
	"GET /v1/feedback",
	"GET /v1/models",
	"GET /v1/models/*",
	"GET /v1/usage",
	"POST /generate",
	"POST /operator/reviews",
	"POST /v1/chat/completions",
	"POST /v1/collections/*",
	"POST /v1/completions",
	"POST /v1/embeddings",
	"POST /v1/feedback",
	"POST /v1/responses",
	"POST /v1/search",
}

count_of := {"type": "integer", "minimum": 1}

words := {"type": "array", "uniqueItems": true, "items": {"type": "string", "minLength": 1}}

named(schema) := {
	"type": "object",
	"minProperties": 1,
	"additionalProperties": false,
	"patternProperties": {"^[a-z][a-z0-9_-]*$": schema},
}

closed(properties) := {
	"type": "object",
	"additionalProperties": false,
	"required": object.keys(properties),
	"properties": properties,
}

roles_schema := named(closed({
	"actions": {"type": "array", "uniqueItems": true, "items": {"enum": actions}},
	"models": object.union(words, {"minItems": 1}),
	"max_tokens": {"type": "integer", "minimum": 0},
	"rate_class": {"type": "string"},
	"log_prompt": {"type": "boolean"},
	"duties": words,
}))

rates_schema := named(closed({
	"rank": count_of,
	"priority": {"type": "integer", "minimum": 0, "maximum": 9},
	"requests_per_minute": count_of,
	"tokens_per_minute": count_of,
	"tokens_per_day": count_of,
}))

tenants_schema := {
	"type": "object",
	"additionalProperties": {
		"type": "object",
		"additionalProperties": false,
		"minProperties": 1,
		"properties": {
			"weight": {"type": "integer", "minimum": 1, "maximum": 100},
			"keep_prompts": {"type": "boolean"},
			"reviewed_by": object.union(words, {"minItems": 1}),
		},
	},
}

groups_schema := {
	"type": "object",
	"additionalProperties": false,
	"patternProperties": {"^.": object.union(words, {"minItems": 1})},
}

# As the gateway's configuration names models.
model_name := "^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$"

day := {"type": "string", "format": "date"}

aliases_schema := {
	"type": "object",
	"maxProperties": 256,
	"additionalProperties": false,
	"patternProperties": {model_name: {
		"type": "object",
		"additionalProperties": false,
		"required": ["model"],
		"properties": {
			"model": {"type": "string", "pattern": model_name},
			"collections": object.union(words, {"minItems": 1, "maxItems": 16}),
			"deprecated": day,
			"sunset": day,
		},
	}},
}

collections_schema := {
	"type": "object",
	"maxProperties": 256,
	"additionalProperties": false,
	"patternProperties": {"^[a-z0-9][a-z0-9-]{0,63}$": {
		"type": "object",
		"additionalProperties": false,
		"required": ["tenant", "readers"],
		"properties": {
			"tenant": {"type": "string", "minLength": 1},
			"readers": object.union(words, {"minItems": 1}),
			"writers": object.union(words, {"minItems": 1}),
		},
	}},
}

# A share of answers, of 0 to 0.5 but not 0, which would halt an equal candidate.
share := {"type": "number", "minimum": 0.0001, "maximum": 0.5}

guardrails_schema := closed({
	"slow_seconds": {"type": "number", "minimum": 0.001, "maximum": 300},
	"slow": share,
	"failed": share,
	"refused": share,
	"length": {"type": "number", "minimum": 0.01, "maximum": 10},
	"refusals": {"type": "array", "items": {"type": "string", "minLength": 3, "maxLength": 40}},
})

metrics_schema := {
	"type": "object",
	"minProperties": 2,
	"maxProperties": 2,
	"additionalProperties": {"enum": ["higher", "lower"]},
}

changed_schema := closed({
	"by": {"type": "string", "minLength": 1},
	"at": {"type": "string", "pattern": "^2[0-9]{3}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z$"},
	"what": {"type": "string", "minLength": 1},
	"reason": {"type": "string", "minLength": 1},
})

experiments_schema := {
	"type": "object",
	"additionalProperties": false,
	"patternProperties": {"^[a-z0-9][a-z0-9-]{0,62}$": closed({
		"model": {"type": "string", "minLength": 1},
		"control": {"type": "string", "minLength": 1},
		"candidate": {"type": "string", "minLength": 1},
		"unit": {"enum": ["subject", "request"]},
		"tenants": object.union(words, {"minItems": 1}),
		"percent": {"type": "integer", "minimum": 0, "maximum": 100},
		"salt": {"type": "string", "pattern": "^[A-Za-z0-9]{16,64}$"},
		"shadow": {"type": "integer", "minimum": 0, "maximum": 100},
		"minimum": {"type": "integer", "minimum": 30},
		"metrics": metrics_schema,
		"guardrails": guardrails_schema,
		"changed": changed_schema,
	})},
}

# An estate's own source may lack these.
default groups := {}

groups := data.llm.groups

default aliases := {}

aliases := data.llm.aliases

default collections := {}

collections := data.llm.collections

# METADATA
# description: Empty when the data can be signed.
# entrypoint: true
problems contains "llm/roles: there are no roles" if not is_object(data.llm.roles)

problems contains "llm/rates: there are no rate classes" if not is_object(data.llm.rates)

problems contains sprintf("llm/roles: %s: %s", [error.field, error.desc]) if {
	is_object(data.llm.roles)
	some error in json.match_schema(data.llm.roles, roles_schema)[1]
}

problems contains sprintf("llm/rates: %s: %s", [error.field, error.desc]) if {
	is_object(data.llm.rates)
	some error in json.match_schema(data.llm.rates, rates_schema)[1]
}

problems contains sprintf("llm/tenants: %s: %s", [error.field, error.desc]) if {
	some error in json.match_schema(data.llm.tenants, tenants_schema)[1]
}

problems contains sprintf("llm/tenants: %s: its prompts are not kept, so there is nothing to review", [tenant]) if {
	some tenant, said in data.llm.tenants
	said.reviewed_by
	not said.keep_prompts == true
}

problems contains sprintf("llm/collections: %s: %s", [error.field, error.desc]) if {
	some error in json.match_schema(collections, collections_schema)[1]
}

problems contains sprintf("llm/collections: %s: llm/roles has no role %s", [name, role]) if {
	is_object(collections)
	some name, collection in collections
	some field in ["readers", "writers"]
	some role in collection[field]
	not data.llm.roles[role]
}

problems contains "llm/groups: it is no object with a name for each entry" if not is_object(groups)

problems contains sprintf("llm/groups: %s: %s", [error.field, error.desc]) if {
	is_object(groups)
	some error in json.match_schema(groups, groups_schema)[1]
}

problems contains sprintf("llm/groups: %s: llm/roles has no role %s", [group, role]) if {
	some group, roles in groups
	is_array(roles)
	some role in roles
	is_string(role)
	role != ""
	not data.llm.roles[role]
}

problems contains sprintf(
	"llm/groups: %s: one subject may not hold %s: its members would be denied everything",
	[group, concat(" and ", authz.duties_apart)],
) if {
	some group, roles in groups
	count(authz.duties_apart - {duty | some role in roles; some duty in data.llm.roles[role].duties}) == 0
}

problems contains "llm/aliases: it is no object with a name for each entry" if not is_object(aliases)

problems contains sprintf("llm/aliases: %s: %s", [error.field, error.desc]) if {
	is_object(aliases)
	some error in json.match_schema(aliases, aliases_schema)[1]
}

problems contains sprintf(
	"llm/aliases: %s leads to %s, an alias: name a model that is served",
	[name, alias.model],
) if {
	some name, alias in aliases
	aliases[alias.model]
}

problems contains sprintf("llm/aliases: %s: llm/collections has no %s", [name, collection]) if {
	some name, alias in aliases
	some collection in alias.collections
	not collections[collection]
}

problems contains sprintf("llm/aliases: %s is a model of the experiment %s, too", [name, experiment]) if {
	some experiment, arms in data.llm.experiments
	some name in [arms.model, arms.control, arms.candidate]
	aliases[name]
}

problems contains sprintf(
	"llm/roles: %s: %s is an alias, which grants nothing: name the model %s",
	[role, name, alias.model],
) if {
	some role, granted in data.llm.roles
	some name in granted.models
	alias := aliases[name]
}

problems contains sprintf(
	"llm/aliases: %s: it has a sunset and is not deprecated: add the day since when it is",
	[name],
) if {
	some name, alias in aliases
	alias.sunset
	not alias.deprecated
}

problems contains sprintf(
	"llm/aliases: %s: its sunset %s is before %s, when it is deprecated",
	[name, alias.sunset, alias.deprecated],
) if {
	some name, alias in aliases
	alias.sunset < alias.deprecated
}

problems contains sprintf("llm/experiments: %s: %s", [error.field, error.desc]) if {
	some error in json.match_schema(data.llm.experiments, experiments_schema)[1]
}

problems contains sprintf("llm/experiments: %s: both arms are %v, name two models", [name, experiment.control]) if {
	some name, experiment in data.llm.experiments
	experiment.control == experiment.candidate
}

problems contains sprintf("llm/experiments: %s and %s both ask %v about %v", [name, other, tenant, one.model]) if {
	some name, one in data.llm.experiments
	some other, two in data.llm.experiments
	name < other
	one.model == two.model
	some tenant in one.tenants
	tenant in two.tenants
}

problems contains sprintf("llm/roles: %s: llm/rates has no class %v", [name, role.rate_class]) if {
	some name, role in data.llm.roles
	not data.llm.rates[role.rate_class]
}

problems contains sprintf("llm/roles: %s: one role may not hold %s", [name, concat(" and ", authz.duties_apart)]) if {
	some name, role in data.llm.roles
	count(authz.duties_apart - {duty | some duty in role.duties}) == 0
}

problems contains sprintf("llm/roles: %s: \"*\" is all models, name no others beside it", [name]) if {
	some name, role in data.llm.roles
	"*" in role.models
	count(role.models) > 1
}

problems contains sprintf("llm/rates: %s: two classes have the rank %v", [concat(" and ", classes), rate.rank]) if {
	some rate in data.llm.rates
	classes := {name | data.llm.rates[name].rank == rate.rank}
	count(classes) > 1
}
