"""From a training command to machines: processes on this one, Cloud TPU VMs through gcloud, GKE through xpk.

Every module is pure functions from settings to command lines (lists of arguments, never a shell string), and one
function that runs them. Nothing here imports JAX: the machine that launches needs no accelerator.
"""
