"""The native API, `POST /generate`: request, response, route; knows no queue and no worker."""
