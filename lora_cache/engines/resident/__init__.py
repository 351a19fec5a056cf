"""The resident engine: we decide which adapter sits in which slot, and write it there ourselves.

Three processes.  The manager's: `engine` is the engine, `host_images` its host tier, `workers` its
end of the sockets, `packing_line` its end of the packer, `arena` the host memory that all three
share, `rooms` the stretches of it that images are in.  The packer's: `packer` is the process,
`workshop` carries out its `jobs`, `making` reads an image that is kept on disk (`image_store`,
`image_file`) or has it packed (`packing`, out of a
`weights_file`), with several `hands`.  vLLM's worker's: `plugin` switches it on, `compat` knows
vLLM's versions, `worker` replaces vLLM's worker-side LoRA manager, `table` says which adapter is in
which slot, `steps` knows which steps have finished on the device, `agent` is the thread that fills
slots, from `images` (which `page_locks` makes ready for a GPU) by way of `slots` (on a GPU:
`scatter`), or of vLLM's own loader (`native`); it describes its slots once (`describe`, `probing`).
All of them know `layout` and `names`; they talk by `framing`, manager and agent in `wire`.

Modules are imported one by one, by the process that needs them, and none of them by
``import lora_cache``.
"""
