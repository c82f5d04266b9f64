//! A worker: [`crate::transport::WorkerService`] over its shard store and executors.
