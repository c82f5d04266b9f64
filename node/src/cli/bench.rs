//! What `node bench` can be told.

use std::path::PathBuf;

use actors::matmul::devices::GpuRequest;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand};
use protocol::ids::LinearShape;
use protocol::model::synthetic::KnownModel;

use super::{count, known_model};
use crate::bench::account::{AccountOptions, Subject};
use crate::bench::exactness::ExactnessOptions;
use crate::bench::generate::GenerateOptions;
use crate::bench::gpu::GpuOptions;
use crate::bench::linear::{LinearOptions, Parameters};
use crate::bench::multiplier::Device;
use crate::bench::step::StepOptions;
use crate::config::{BackendChoice, HeadChoice, OwnerConfig};
use crate::link::{Line, Route, Transport};

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// The owner's account: its processor seconds beside those of training in plain text alone
    Account(AccountArguments),
    /// One encrypted product, as an owner and a worker do it
    Linear(LinearArguments),
    /// Whole training steps, with real worker processes on this machine
    Step(StepArguments),
    /// Tokens one by one, as they are generated, with real worker processes on this machine
    Generate(TokenArguments),
    /// Random products against the portable kernel, byte for byte
    Exactness(ExactnessArguments),
    /// The products of a model's layer on a GPU, beside cuBLASLt's plain ones
    Gpu(GpuArguments),
}

/// The arguments of `node bench account`.
#[derive(Args, Debug)]
pub struct AccountArguments {
    /// Model: a Hugging Face folder or a .gguf file
    #[arg(long, value_name = "PATH", required_unless_present = "shape", conflicts_with = "shape")]
    pub model: Option<PathBuf>,

    /// Instead of a model a published configuration, projected from one of its layers with random weights
    #[arg(long, value_name = "NAME", value_parser = known_model())]
    pub shape: Option<KnownModel>,

    /// Worker processes
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = count())]
    pub workers: usize,

    /// Tokens of a step
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = count())]
    pub tokens: usize,

    /// Tokens of a sequence; divides the tokens of a step
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = count())]
    pub sequence: usize,

    /// Micro-batches that the sequences of a step are divided among, all of them in flight at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count())]
    pub micro_batches: usize,

    /// Where the head's products are computed with encryption
    #[arg(long, value_enum, default_value_t = HeadChoice::Auto)]
    pub head: HeadChoice,

    /// Steps of each kind that are measured, after one that warms up
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = count())]
    pub steps: usize,

    /// What lies between the owner and its workers
    #[command(flatten)]
    pub route: RouteArguments,

    /// Print one JSON object instead of lines for people
    #[arg(long)]
    pub json: bool,
}

impl From<AccountArguments> for AccountOptions {
    fn from(arguments: AccountArguments) -> Self {
        let AccountArguments { model, shape, workers, tokens, sequence, micro_batches, head, steps, route, json } =
            arguments;
        // One of the two is given: the arguments are refused without.
        let subject = shape.map_or_else(|| Subject::Model(model.unwrap_or_default()), Subject::Shape);
        Self { subject, workers, tokens, sequence, micro_batches, head, steps, route: route.into(), json }
    }
}

/// What `node bench` puts between an owner and its workers.
#[derive(Args, Debug)]
pub struct RouteArguments {
    /// What carries the connections between the owner and the workers
    #[arg(long, value_enum, default_value_t = Transport::default())]
    pub transport: Transport,

    /// A link between the owner and each worker: its round trip, and its rate in each direction (kbit, mbit, gbit or
    /// unlimited), such as 20ms,100mbit
    #[arg(long, value_name = "DELAY,RATE")]
    pub link: Option<Line>,
}

impl From<RouteArguments> for Route {
    fn from(arguments: RouteArguments) -> Self {
        let RouteArguments { transport, link } = arguments;
        Self { transport, link }
    }
}

/// The arguments of `node bench exactness`.
#[derive(Args, Debug)]
pub struct ExactnessArguments {
    /// cpu (all kernels of this machine), or cuda:0 (all engines)
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: Device,

    /// Time for random products
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub seconds: u64,

    /// Seed of the first random product; each further one has the next number
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

impl From<ExactnessArguments> for ExactnessOptions {
    fn from(arguments: ExactnessArguments) -> Self {
        let ExactnessArguments { device, seconds, seed } = arguments;
        Self { device, seconds, seed }
    }
}

/// The arguments of `node bench generate`.
#[derive(Args, Debug)]
pub struct TokenArguments {
    /// Model: a Hugging Face folder or a .gguf file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,

    /// Worker processes
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = count())]
    pub workers: usize,

    /// GPUs that each worker serves with: none, all, or indices like 0,1
    #[arg(long, value_name = "LIST", default_value = "none")]
    pub gpus: GpuRequest,

    /// Tokens that are measured, after a few that warm up
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = count())]
    pub tokens: usize,

    /// Texts that are written side by side, each by a token at a time: rows of a product
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count())]
    pub rows: usize,

    /// The owner's memory for pads, MiB (owner.pad_mib): as the model's size suggests where it is not given, and 0 for none
    #[arg(long, value_name = "MIB")]
    pub pad_mib: Option<u64>,

    /// What lies between the owner and its workers
    #[command(flatten)]
    pub route: RouteArguments,

    /// Print one JSON object instead of lines for people
    #[arg(long)]
    pub json: bool,
}

impl From<TokenArguments> for GenerateOptions {
    fn from(arguments: TokenArguments) -> Self {
        let TokenArguments { model, workers, gpus, tokens, rows, pad_mib, route, json } = arguments;
        Self { model, workers, gpus, tokens, rows, pad_mib, route: route.into(), json }
    }
}

/// The arguments of `node bench gpu`.
#[derive(Args, Debug)]
pub struct GpuArguments {
    /// cuda:0
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0")]
    pub device: Device,

    /// Whose products
    #[arg(long, value_name = "NAME", default_value = KnownModel::Llama32_1b.name(), value_parser = known_model())]
    pub model_shape: KnownModel,

    /// Rows of the products
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "2048,4096", value_parser = count())]
    pub tokens: Vec<usize>,

    /// Ask no GPU: print the operations and bytes of each product, and the least time they take
    #[arg(long)]
    pub floor: bool,

    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

impl From<GpuArguments> for GpuOptions {
    fn from(arguments: GpuArguments) -> Self {
        let GpuArguments { device, model_shape: model, tokens, floor: _, json } = arguments;
        Self { device, model, tokens, json }
    }
}

/// The arguments of `node bench linear`.
#[derive(Args, Debug)]
pub struct LinearArguments {
    /// Rows of the weights
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = count())]
    pub d_in: usize,

    /// Columns of the weights
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = count())]
    pub d_out: usize,

    /// Rows of the product
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = count())]
    pub tokens: usize,

    /// Encryption: as the planner chooses, by a parameter set, or the published scheme (seconds for each token)
    #[arg(long, value_name = "NAME", default_value = "auto", value_parser = parameters())]
    pub params: Parameters,

    /// cpu, or cuda:0
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: Device,

    /// Print one JSON object instead of lines for people
    #[arg(long)]
    pub json: bool,
}

impl From<LinearArguments> for LinearOptions {
    fn from(arguments: LinearArguments) -> Self {
        let LinearArguments { d_in, d_out, tokens, params, device, json } = arguments;
        Self { shape: LinearShape { d_in, d_out }, tokens, parameters: params, device, json }
    }
}

/// The names of the parameters.
fn parameters() -> impl TypedValueParser<Value = Parameters> {
    PossibleValuesParser::new(Parameters::NAMES).try_map(|name| name.parse::<Parameters>())
}

/// The arguments of `node bench step`.
#[derive(Args, Debug)]
pub struct StepArguments {
    /// Model: a Hugging Face folder or a .gguf file
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,

    /// Worker processes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count())]
    pub workers: usize,

    /// GPUs that each worker serves with: none, all, or indices like 0,1
    #[arg(long, value_name = "LIST", default_value = "none")]
    pub gpus: GpuRequest,

    /// Tokens of a step
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = count())]
    pub tokens: usize,

    /// Tokens of a sequence; divides the tokens of a step
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = count())]
    pub sequence: usize,

    /// Micro-batches that the sequences of a step are divided among, all of them in flight at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count())]
    pub micro_batches: usize,

    /// The owner's memory for the products of the masks, MiB (owner.mask_cache_mib); the rest goes to its file
    #[arg(long, value_name = "MIB", default_value_t = OwnerConfig::default().mask_cache_mib)]
    pub mask_cache_mib: u64,

    /// Keep the products of the masks for later runs, and use those of earlier ones (owner.keep_masks)
    #[arg(long)]
    pub keep_masks: bool,

    /// Where the head's products are computed with encryption
    #[arg(long, value_enum, default_value_t = HeadChoice::Auto)]
    pub head: HeadChoice,

    /// Steps that are measured, after one that warms up
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = count())]
    pub steps: usize,

    /// Where base products are computed: by workers on ciphertexts, or in the owner with f32 weights
    #[arg(long, value_enum, default_value_t = BackendChoice::Encrypted)]
    pub backend: BackendChoice,

    /// What lies between the owner and its workers
    #[command(flatten)]
    pub route: RouteArguments,

    /// Write a trace of each process beside this name, in Chrome's format
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,

    /// Print one JSON object instead of lines for people
    #[arg(long)]
    pub json: bool,
}

impl From<StepArguments> for StepOptions {
    fn from(arguments: StepArguments) -> Self {
        let StepArguments {
            model,
            workers,
            gpus,
            tokens,
            sequence,
            micro_batches,
            mask_cache_mib,
            keep_masks,
            head,
            steps,
            backend,
            route,
            trace,
            json,
        } = arguments;
        Self {
            model,
            workers,
            gpus,
            tokens,
            sequence,
            micro_batches,
            mask_cache_mib,
            keep_masks,
            head,
            steps,
            backend,
            route: route.into(),
            trace,
            parts: false,
            json,
        }
    }
}
