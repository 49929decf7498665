"""What a policy is worth: answers, votes, rankings and searches over held-out prompts, each with an interval."""
