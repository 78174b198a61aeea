# OPA's socket offers only decisions, the policy's revision, the key that must sign a policy, and OPA's health.
package system.authz

default allow := false

allow if {
	input.method == "POST"
	input.path == ["v1", "data", "llm", "authz", "decision"]
}

allow if {
	input.method in {"GET", "POST"}
	input.path == ["v1", "data", "llm", "meta"]
}

allow if {
	input.method == "GET"
	input.path == ["health"]
}

allow if {
	input.method == "GET"
	input.path == ["v1", "data", "system", "authz", "signing"]
}

signing := opa.runtime().config.bundles.llm.signing
