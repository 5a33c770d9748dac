"""`tandem plan`: the goodput planner's questions answered by capacity studies on the event heap."""
