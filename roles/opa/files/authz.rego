# Who reaches OPA's socket may ask for a decision, for the policy's revision, and whether OPA is well. Nothing else.
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
