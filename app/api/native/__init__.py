"""The dialect of `POST /generate`: request, response, route; knows no queue and no worker."""
