//! Where spans go that show the pipeline of a step: tracing targets of their own, so that a trace file holds these and
//! nothing else, and a log none of them.

/// Work that one thread does from the span's begin to its end: a product, an encryption, a backward pass.
pub const WORK: &str = "velum::trace::work";

/// What is under way while nobody's thread is busy with it: a product that was sent and is awaited, a whole step.
pub const FLIGHT: &str = "velum::trace::flight";
