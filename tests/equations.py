"""Equations of optimizers, read from papers into dense NumPy arrays; they use nothing of dpopt."""

import math

import numpy as np

# Transcriptions: (θ, gradients g_1 … g_T, noise of each step) → θ_T


def sgd(x, gradients, noise, lr):
    for g in gradients:
        x = x - lr * g
    return x


def adam(x, gradients, noise, lr, decay=0.0, corrected=False, floor=0.0):
    b1, b2, eps = 0.9, 0.999, 1e-8
    m, v, phi = np.zeros_like(x), np.zeros_like(x), 0.0
    for t, (g, s) in enumerate(zip(gradients, noise, strict=True), start=1):
        m, v, phi = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2, b2 * phi + (1 - b2) * s**2
        m_hat, v_hat, phi_hat = m / (1 - b1**t), v / (1 - b2**t), phi / (1 - b2**t)
        denominator = np.sqrt(np.maximum(v_hat - phi_hat, floor)) if corrected else np.sqrt(v_hat) + eps
        x = x - lr * decay * x - lr * m_hat / denominator
    return x


def sign_sgd(x, gradients, noise, lr, momentum=0.0):
    m = np.zeros_like(x)
    for g in gradients:
        m = momentum * m + (1 - momentum) * g
        x = x - lr * np.sign(m)
    return x


def lamb(x, gradients, noise, lr, b1=0.9, b2=0.999, eps=1e-6, decay=0.0):
    m, v = np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        r = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * x
        x = x - lr * np.linalg.norm(x) / np.linalg.norm(r) * r
    return x


def averaged_sgd(x, gradients, noise, lr, momentum, plain_steps):
    m = gradients[0]
    for t, g in enumerate(gradients, start=1):
        m = momentum * m + (1 - momentum) * g
        x = x - lr * (g if t <= plain_steps else m)
    return x


def micro_adam(x, gradients, noise, lr, density, window):
    b1, b2, eps = 0.9, 0.999, 1e-8
    k, e, rows = math.ceil(density * x.size), np.zeros(x.size), []
    for t, g in enumerate(gradients, start=1):
        a = g.ravel() + e
        kept = np.zeros(x.size)
        largest = np.argsort(-np.abs(a))[:k]
        kept[largest] = a[largest]
        e, rows = a - kept, [kept, *rows][:window]
        m = (1 - b1) / (1 - b1**t) * sum(b1**age * row for age, row in enumerate(rows))
        v = (1 - b2) / (1 - b2**t) * sum(b2**age * row**2 for age, row in enumerate(rows))
        x = x - (lr * m / (eps + np.sqrt(v))).reshape(x.shape)
    return x


def noise_normalized(x, gradients, noise, lr, momentum):
    m = np.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        m = momentum * m + (1 - momentum) * g
        x = x - lr * m / (1 - momentum**t) / noise[t - 1]
    return x


def adam_mini(x, gradients, noise, lr, bucket, decay):
    b1, b2, eps = 0.9, 0.999, 1e-8
    m, v = np.zeros_like(x), np.zeros(x.size)
    for t, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * g
        for first in range(0, x.size, bucket):
            own = slice(first, first + bucket)
            v[own] = b2 * v[own] + (1 - b2) * np.mean(g.ravel()[own] ** 2)
        root = np.sqrt(v / (1 - b2**t)).reshape(x.shape) + eps
        x = x - lr * decay * x - lr * m / (1 - b1**t) / root
    return x


def mada(x, gradients, noise, lr, betas, c, rho, decay):
    """With fixed coefficients; how they learn: test_mada.py."""
    b1, b2, b3 = betas
    m, n, v, mean, square, last = *(np.zeros_like(x) for _ in range(5)), gradients[0]
    for t, g in enumerate(gradients, start=1):
        m, n = b1 * m + (1 - b1) * g, b3 * n + (1 - b3) * (g - last)
        ahead = (g + b3 * (g - last)) ** 2
        adam_or_yogi = c * ahead + (1 - c) * (square + ahead * np.sign(ahead - square))
        v = b2 * v + (1 - b2) * adam_or_yogi
        mean = ((t - 1) * mean + v) / t
        square = rho * v + (1 - rho) * mean
        x = x - lr * decay * x
        x = x - lr * (m / (1 - b1**t) + b3 * n) / (np.sqrt(square / (1 - b2**t)) + 1e-8)
        last = g
    return x


def sofim(x, gradients, noise, lr, beta=0.9, rho=0.5):
    """With the matrix F itself; of a vector of all parameters."""
    m = np.zeros_like(x)
    for t, u in enumerate(gradients, start=1):
        m = beta * m + (1 - beta) * u
        mean = m / (1 - beta**t)
        x = x - lr * np.linalg.solve(np.outer(mean, mean) + rho * np.eye(len(x)), mean)
    return x
