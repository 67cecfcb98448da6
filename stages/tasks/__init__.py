"""What a task is: the Task protocol, the declarative supervised task, data, losses, and the loader of a user's code."""
