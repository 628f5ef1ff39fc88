"""`moelora bench`: what a routed layer, a model and a call cost on this CPU, against other ways of doing the same."""
