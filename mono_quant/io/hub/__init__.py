"""The Hub: who asks and what a failure means, a repository pinned to a commit, pushes of one commit."""
