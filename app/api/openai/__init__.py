"""OpenAI's images API: fields, request, response, events; knows no queue and no worker."""
