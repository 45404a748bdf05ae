"""Traffic and how it was served: traces, arrival processes, lengths, the load client, the report.

Reading order: `trace`, `arrivals`, `lengths` say what traffic there is; `requests` makes a deterministic list of it,
`traffic` from the options of a run; `drive` decides when each is sent (open or closed loop); `client` sends over
HTTP and `offline` to an engine in this process; `report` turns the records into figures, with `slo` for goodput.
"""
