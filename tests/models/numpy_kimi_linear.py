"""The released model's forward pass in float64 NumPy, token by token, written from its specification alone.

Every function takes `mistake`, the name of one deliberate error or None: a parity test is worth what it would catch.
"""

import numpy as np

MISTAKES = (
    "conv taps reversed",
    "conv without silu",
    "delta rule on the undecayed state",
    "no query scale",
    "swish output gate",
    "a_log without exp",
    "beta doubled",
    "output norm eps 1e-6",
    "latent norm eps 1e-5",
    "mla scale of the nope part",
    "top-k without the bias",
    "expert weights with the bias",
    "no renormalisation",
    "gate and up swapped",
)
NORM_EPS, LATENT_EPS, L2_EPS = 1e-5, 1e-6, 1e-6


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def silu(z):
    return z * sigmoid(z)


def rms(x, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)


def swiglu(x, p, mistake):
    gate, up = (p["up"], p["gate"]) if mistake == "gate and up swapped" else (p["gate"], p["up"])
    return (silu(x @ gate) * (x @ up)) @ p["down"]


def convolve(u_THK, w_HKW, mistake):
    W = w_HKW.shape[-1]
    if mistake == "conv taps reversed":
        w_HKW = w_HKW[..., ::-1]
    padded = np.concatenate([np.zeros((W - 1, *u_THK.shape[1:])), u_THK])
    c = sum(w_HKW[..., j] * padded[j : j + len(u_THK)] for j in range(W))
    return c if mistake == "conv without silu" else silu(c)


def kda(x_TD, p, mistake):
    def stream(name):
        return convolve(np.einsum("td,dhk->thk", x_TD, p["qkv"][name]), p["qkv"][f"{name}_conv"]["weight"], mistake)

    def l2(z):
        return z / np.sqrt(np.sum(z * z, -1, keepdims=True) + L2_EPS)

    q, k, v = l2(stream("query")), l2(stream("key")), stream("value")
    T, H, K = q.shape
    if mistake != "no query scale":
        q = q * K**-0.5
    raw = np.einsum("td,dr,rhk->thk", x_TD, p["decay"]["down"], p["decay"]["up"])
    gate = p["decay"]["gate"]
    rate = gate["a_log"] if mistake == "a_log without exp" else np.exp(gate["a_log"])
    alpha = np.exp(-rate[:, None] * np.logaddexp(0, raw + gate["dt_bias"]))
    beta = sigmoid(x_TD @ p["beta"]["weight"]) * (2 if mistake == "beta doubled" else 1)
    o = np.zeros((T, H, v.shape[-1]))
    for h in range(H):
        state = np.zeros((K, v.shape[-1]))
        for t in range(T):
            decayed = alpha[t, h][:, None] * state
            read = state if mistake == "delta rule on the undecayed state" else decayed
            state = decayed + beta[t, h] * np.outer(k[t, h], v[t, h] - read.T @ k[t, h])
            o[t, h] = state.T @ q[t, h]
    z = np.einsum("td,dr,rhv->thv", x_TD, p["output"]["gate"]["down"], p["output"]["gate"]["up"])
    activation = silu if mistake == "swish output gate" else sigmoid
    eps = 1e-6 if mistake == "output norm eps 1e-6" else NORM_EPS
    return np.einsum("thv,hvd->td", rms(o, eps) * p["output"]["norm"] * activation(z), p["output"]["weight"])


def mla(x_TD, p, nope_dim, mistake):
    q = np.einsum("td,dhk->thk", x_TD, p["query"])
    down = x_TD @ p["latent_down"]
    rank = p["latent_up"].shape[0]
    latent_eps = 1e-5 if mistake == "latent norm eps 1e-5" else LATENT_EPS
    latent, shared = rms(down[:, :rank], latent_eps) * p["latent_norm"]["weight"], down[:, rank:]
    kv = np.einsum("tr,rhk->thk", latent, p["latent_up"])
    T, H, Q = q.shape
    k = np.concatenate([kv[..., :nope_dim], np.broadcast_to(shared[:, None], (T, H, Q - nope_dim))], axis=-1)
    scale = (nope_dim if mistake == "mla scale of the nope part" else Q) ** -0.5
    logits = np.where(np.tri(T, dtype=bool), scale * np.einsum("thk,shk->hts", q, k), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shv,hvd->td", weights, kv[..., nope_dim:], p["output"])


def moe(x_TD, p, bias_E, top_k, scaling, mistake):
    score = sigmoid(x_TD @ p["router"]["weight"])
    choice = score if mistake == "top-k without the bias" else score + bias_E
    y = swiglu(x_TD, p["shared"], mistake)
    for t, x in enumerate(x_TD):
        best = np.argsort(-choice[t], kind="stable")[:top_k]
        weight = (choice if mistake == "expert weights with the bias" else score)[t, best]
        if mistake != "no renormalisation":
            weight = weight / (weight.sum() + 1e-20)
        for w, e in zip(scaling * weight, best, strict=True):
            y[t] += w * swiglu(x, {name: leaf[e] for name, leaf in p["experts"].items()}, mistake)
    return y


def forward(cfg, layers, buffers, outside, tokens_T, mistake=None):
    """Logits [T, A] in float64.

    Args:
      cfg: the model.
      layers: one nested dict of float64 parameters per layer.
      buffers: the balancing bias of each layer's router, None for a dense layer.
      outside: embed [A, D], norm [D], head [D, A].
      tokens_T: one sequence.
      mistake: one of MISTAKES, or None.
    """
    x = outside["embed"][tokens_T]
    for kind, p, bias in zip(cfg.mixer_names, layers, buffers, strict=True):
        y = rms(x, NORM_EPS) * p["mixer_norm"]["weight"]
        nope_dim = cfg.mixers["mla"].nope_dim
        x = x + (kda(y, p["mixer"], mistake) if kind == "kda" else mla(y, p["mixer"], nope_dim, mistake))
        y = rms(x, NORM_EPS) * p["ffn_norm"]["weight"]
        routed = (cfg.ffn.top_k, cfg.ffn.routed_scaling, mistake)
        x = x + (swiglu(y, p["ffn"], mistake) if bias is None else moe(y, p["ffn"], bias, *routed))
    return rms(x, NORM_EPS) * outside["norm"] @ outside["head"]
