"""The ops that speed and memory hang on. One op is one folder: `api` (what to call), `reference` (plain XLA: runs
everywhere, and what tests compare with), and where it pays a kernel. Knows arrays, knows no model."""


def implementations() -> dict[str, str]:
    """The implementation that each op will use on this machine."""
    from jaxtune.kernels import attention, linear_cross_entropy, nf4
    from jaxtune.kernels.choice import choose

    apis = (attention.api, linear_cross_entropy.api, nf4.api)
    return {api.NAME: choose(api.NAME, None, api.IMPLEMENTATIONS) for api in apis}
