# What the shipped roles may do. Who changes llm/roles/data.yaml changes this with it.
package llm.roles_test

import data.llm.authz
import data.llm.validate

generation := {
	"GET /generate",
	"POST /generate",
	"POST /v1/chat/completions",
	"POST /v1/completions",
	"POST /v1/embeddings",
	"POST /v1/responses",
	"POST /v1/search",
}

models := {"GET /v1/models", "GET /v1/models/*"}

own := {"DELETE /v1/feedback", "GET /v1/feedback", "GET /v1/usage", "POST /v1/feedback"}

# Which collections, llm/collections says.
documents := {"DELETE /v1/collections/*", "GET /v1/collections", "GET /v1/collections/*", "POST /v1/collections/*"}

may(role) := {action |
	some action in validate.actions
	decided([role], action).allow
}

decided(roles, action) := decision if {
	decision := authz.decision with input as {"subject": "s", "tenant": "t", "roles": roles, "action": action}
		with data.llm.meta as {"revision": 1, "expires": "2030-01-01T00:00:00Z"}
		with time.now_ns as 0
}

test_an_analyst_may_get_generate_and_nothing_else if may("analyst") == {"GET /generate"}

pages := {"GET /operator/*", "GET /operator/experiments", "GET /operator/reviews", "POST /operator/reviews"}

test_a_developer_may_use_every_route_of_the_gateway if may("developer") == validate.actions - pages

test_each_page_is_of_one_role if {
	of_role := {role: granted |
		some role, _ in data.llm.roles
		granted := may(role) & pages
		granted != set()
	}
	of_role == {
		"operator": {"GET /operator/*"},
		"expert": {"GET /operator/reviews", "POST /operator/reviews"},
		"product_owner": {"GET /operator/experiments"},
	}
	may("expert") == of_role.expert
	may("product_owner") == of_role.product_owner
}

test_a_trainer_generates_with_higher_limits_and_its_prompts_are_kept if {
	may("trainer") == ((generation | models) | own) | documents
	trainer := decided(["trainer"], "POST /generate")
	developer := decided(["developer"], "POST /generate")
	trainer.max_tokens > developer.max_tokens
	trainer.rate.tokens_per_day > developer.rate.tokens_per_day
	trainer.log_prompt
	not developer.log_prompt
}

test_who_asks_in_bulk_goes_after_everybody_else if {
	priorities := {class: rate.priority | some class, rate in data.llm.rates}
	every priority in object.remove(priorities, ["batch"]) {
		priority > priorities.batch
	}
}

test_those_who_run_the_estate_generate_nothing if {
	every role in ["operator", "admin", "auditor"] {
		may(role) & generation == set()
		"GET /v1/models" in may(role)
	}
}

test_no_one_is_admin_and_auditor if {
	every action in validate.actions {
		decided(["admin", "auditor"], action).rule == "separation_of_duties"
	}
}

test_the_shipped_data_has_no_problems if validate.problems == set()
