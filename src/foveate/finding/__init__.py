"""Finding what to steer, and judging it: a task, the response of every head, a search, and a held-out report.

judging       a task's examples under mechanisms: scores, whatever the mechanisms need (spans per prompt, prompt edits)
responding    how the task's loss answers to an edit in each head, from one backward pass
searching     coordinate search over an edit's parameters, scalars first, then layers, then heads
reporting     before and after on held-out examples, a second task, perplexity and time
"""
