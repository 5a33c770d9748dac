"""The goodput planner: which workers, of how many devices each, serve the most requests within their targets.

Pure: what a plan attains at a rate is asked of an evaluator that is passed in (`plans.Evaluator`); a study in the
simulator, a formula in a test. DistServe's two placement algorithms (OSDI'24, section 4) and Splitwise's provisioning
(ISCA'24, section 4.4) are the models:

- `space`: which plans there are, on a fast fabric (KV goes anywhere) and on a slow one (only within a node);
- `bench`: asks the evaluator, remembers, and concludes what needs no asking;
- `search`: the best plan, the runner-up and the best colocated one, for a number of devices or for a rate;
- `reasons`: why, in words.
"""
