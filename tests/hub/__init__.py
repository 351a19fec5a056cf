"""Adapters from a real Hub server: olah over git repositories, behind a proxy that injects faults.

Usable without pytest too::

    with OlahServer(directory) as server, HubProxy(server.url, mirror=server.mirror) as proxy:
        commit = HubRepos(server.mirror).create("acme/sql", adapter_files(nbytes=1_000_000))
        HfApi(endpoint=proxy.url).model_info("acme/sql", revision="main")
"""
