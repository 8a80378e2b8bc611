"""Hooks of schemathesis: what is asked of a model stays short, so that cases are about requests and not about answers."""

import schemathesis

LIMITS = {
    "/v1/chat/completions": ("max_completion_tokens", 4),
    "/v1/completions": ("max_tokens", 4),
    "/v1/messages": ("max_tokens", 4),
    "/v1/responses": ("max_output_tokens", 4),
}


@schemathesis.hook
def map_body(context, body):
    limit = LIMITS.get(context.operation.path)
    if limit and isinstance(body, dict):
        name, most = limit
        # A wrong limit is a case of its own.
        if body.get(name) is None or (isinstance(body[name], int) and body[name] > most):
            body[name] = most
        if isinstance(body.get("n"), int) and body["n"] > 2:
            body["n"] = 2
    return body
