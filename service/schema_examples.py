"""What the documentation shows of every object and every body."""

from typing import Any

DATASET: dict[str, Any] = {
    "id": "dataset-019a1c3e5f7a7c2e8d41a6f0c35b9e12",
    "object": "dataset",
    "name": "support answers",
    "status": "ready",
    "bytes": 184320,
    "rows": 412,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "created_at": 1793520000.25,
}
JOB: dict[str, Any] = {
    "id": "job-019a1c3f02d47b31b0a7c9e41d5f6a83",
    "object": "job",
    "kind": "train",
    "name": "support",
    "status": "running",
    "phase": "training",
    "base_model": "smollm2-135m-instruct",
    "dataset": DATASET["id"],
    "validation_dataset": None,
    "spec": {
        "lora": {"rank": 16, "alpha": None, "dropout": 0.0, "target_modules": "all-linear", "use_rslora": False},
        "training": {"quantization": "nf4", "epochs": 3, "global_batch": 8, "learning_rate": 0.0002},
    },
    "attempt": 1,
    "step": 42,
    "total_steps": 156,
    "eta_seconds": 310.5,
    "adapter": None,
    "artifact": None,
    "metrics": None,
    "error": None,
    "created_at": 1793520010.5,
    "started_at": 1793520012.0,
    "finished_at": None,
}
ADAPTER: dict[str, Any] = {
    "id": "adapter-019a1c4a77e57d0f9b12c4d8e6a5f301",
    "object": "adapter",
    "name": "support",
    "kind": "train",
    "job": JOB["id"],
    "base_model": "smollm2-135m-instruct",
    "base_digest": "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae",
    "rank": 16,
    "files": [
        {
            "name": "adapter_model.safetensors",
            "size": 9807,
            "sha256": "fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9",
        }
    ],
    "digest": "baa5a0964d3320fbc0c6a922140453c8513ea24ab8fd0577034804a967248096",
    "parents": [],
    "metrics": {
        "steps": 156,
        "train_loss": 0.61,
        "validation_loss_before": 2.31,
        "validation_loss_after": 0.77,
        "best_step": 120,
        "best_validation_loss": 0.74,
        "overfitting_epoch": 2.31,
        "stopped_early": False,
    },
    "created_at": 1793520400.0,
}
ARTIFACT: dict[str, Any] = {
    "id": "artifact-019a1c4f3be57d0f8a21c4d8e6a5f302",
    "object": "artifact",
    "name": "support for llama.cpp",
    "kind": "export",
    "job": "job-019a1c4e12d47b31b0a7c9e41d5f6a84",
    "base_model": "smollm2-135m-instruct",
    "files": [
        {
            "name": "adapter.gguf",
            "size": 9807,
            "sha256": "fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9",
        }
    ],
    "digest": "0263829989b6fd954f72baaf2fc64bc2e2f01d692d4de72986ea808f6e99813f",
    "parents": [{"adapter": ADAPTER["id"], "weight": 1.0}],
    "metrics": {"format": "gguf"},
    "created_at": 1793520900.0,
}
BASE_MODEL: dict[str, Any] = {
    "id": "smollm2-135m-instruct",
    "object": "base_model",
    "source": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
    "digest": ADAPTER["base_digest"],
    "files": ADAPTER["files"],
    "architecture": "LlamaForCausalLM",
    "parameters": 134515008,
    "context_length": 8192,
    "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "created_at": 1793510000.0,
}
EVENT: dict[str, Any] = {
    "seq": 7,
    "object": "job.event",
    "job": JOB["id"],
    "type": "metrics",
    "level": "info",
    "message": "Step 42: loss 0.7312",
    "data": {
        "step": 42,
        "epoch": 0.81,
        "loss": 0.7312,
        "grad_norm": 0.42,
        "learning_rate": 0.00018,
        "tokens_per_second": 812.5,
        "limit_fraction": 0.61,
        "recompute_share": 0.0,
        "peak_bytes": 1073741824,
    },
    "created_at": 1793520100.0,
}

TRAINING: dict[str, Any] = {
    "base_model": "smollm2-135m-instruct",
    "dataset": DATASET["id"],
    "name": "support",
    "lora": {"rank": 16, "target_modules": ["q_proj", "v_proj"]},
    "training": {"quantization": "nf4", "epochs": 3, "learning_rate": 0.0002},
}
MERGE: dict[str, Any] = {
    "adapters": [
        {"adapter": ADAPTER["id"], "weight": 0.7},
        {"adapter": "adapter-019a1c4b11c27ae49d3a5b8f7c6e2d40", "weight": 0.3},
    ],
    "method": "linear",
    "rank": 16,
    "name": "support and style",
}
ANALYZE: dict[str, Any] = {"adapters": MERGE["adapters"], "density": 0.2, "name": "support against style"}
SEARCH: dict[str, Any] = {
    "adapters": [ADAPTER["id"], "style-live"],
    "dataset": DATASET["id"],
    "per": "layer",
    "steps": 40,
    "name": "support in our style",
}
EXTRACT: dict[str, Any] = {
    "base_model": "smollm2-135m-instruct",
    "tuned_model": "smollm2-135m-support",
    "rank": 32,
    "name": "support",
}
EXPORT: dict[str, Any] = {"format": "gguf-merged", "gguf_type": "Q8_0", "name": "support for llama.cpp"}
DATASET_LINE = (
    '{"messages": [{"role": "user", "content": "Where is my order?"}, '
    '{"role": "assistant", "content": "Let me look that up for you."}]}\n'
)
WEBHOOK_REQUEST: dict[str, Any] = {
    "url": "https://example.com/hooks/luthier",
    "event_types": ["job.succeeded", "job.failed"],
    "name": "training bot",
}
WEBHOOK: dict[str, Any] = {
    "id": "webhook-019a1c45a0c37d1f8b02e6d94f7a1c53",
    "object": "webhook",
    **WEBHOOK_REQUEST,
    "enabled": True,
    "created_at": 1793520000.25,
}
DELIVERY: dict[str, Any] = {
    "id": "message-019a1c4be1127f60a5d3c8e72b9f4d18",
    "object": "webhook.delivery",
    "webhook": WEBHOOK["id"],
    "job": JOB["id"],
    "event_type": "job.failed",
    "body": '{"id":"message-019a1c4be1127f60a5d3c8e72b9f4d18","object":"event","type":"job.failed",'
    '"created_at":1793521200,"data":{"id":"job-019a1c3f02d47b31b0a7c9e41d5f6a83","kind":"train","status":"failed",'
    '"adapter":null,"artifact":null,"error":{"code":"diverged","category":"user"}}}',
    "state": "pending",
    "attempts": 1,
    "next_attempt_at": 1793521205.5,
    "last_status": 503,
    "last_error": "answered with 503",
    "created_at": 1793521200.25,
    "delivered_at": None,
}
