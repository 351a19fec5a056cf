"""The resident engine: we decide which adapter sits in which slot, and write it there ourselves.

Three processes.  The manager's: `engine` is the engine, `workers` its end of the sockets,
`packing_line` its end of the packer, `arena` the host memory that all three share.  The packer's:
`packer` takes jobs (`jobs`), `packing` fills images.  vLLM's worker's: `plugin` switches it on,
`compat` knows vLLM's versions, `worker` replaces vLLM's worker-side LoRA manager, `table` says
which adapter is in which slot, `steps` knows which steps have finished on the device, `agent` is
the thread that fills slots, from `images` by way of `slots`, or of vLLM's own loader (`native`); it
describes its slots once (`describe`, `probing`).  All of them know `layout`, `names` and `wire`.

Modules are imported one by one, by the process that needs them, and none of them by
``import lora_cache``.
"""
