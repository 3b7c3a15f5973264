"""One guided step on any model: topology, attention, extra rows, what it costs. Knows neither host nor neighbour."""
