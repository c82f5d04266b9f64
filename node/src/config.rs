//! Configuration: one TOML file for every role, every key with a default, checked as a whole before anything runs.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use actors::checkpoint::CheckpointConfig;
use actors::data::{DataFile, DataOptions, HeldOut};
use actors::matmul::devices::GpuRequest;
use actors::owner::pads::PadRoom;
use actors::trainer::TrainingConfig;
use actors::transport::PeerName;
use actors::worker::Split;
use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;
use libp2p::{Multiaddr, PeerId};
use protocol::he::ParameterSet;
use protocol::quant::PrecisionTarget;
use serde::{Deserialize, Serialize};

/// Everything that can be configured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// A Hugging Face folder or a .gguf file.
    pub model: Option<PathBuf>,
    /// Peers and addresses.
    pub network: NetworkConfig,
    /// What a worker serves with.
    pub worker: WorkerConfig,
    /// How an owner runs.
    pub owner: OwnerConfig,
    /// How precise encrypted products must be.
    pub encryption: EncryptionConfig,
    /// How the lines of the training data become examples.
    pub data: DataOptions,
    /// The adapters, the optimiser and its schedule.
    pub training: TrainingConfig,
    /// What an evaluation shows besides its loss.
    pub eval: EvalConfig,
    /// When an owner saves what it has, so that it can go on from there.
    pub checkpoint: CheckpointConfig,
    /// The keys of `[training.lora]` that the file has.
    #[serde(skip)]
    pub lora_given: BTreeSet<String>,
}

/// `[encryption]`
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EncryptionConfig {
    /// See [`PrecisionTarget::factor`].
    pub factor: f64,
    /// See [`PrecisionTarget::backward`].
    pub backward: f64,
    /// See [`PrecisionTarget::set`].
    pub set: Option<ParameterSet>,
    /// Directions of each matrix's inputs of which the owner computes itself what becomes of them; 0 for none.
    pub compensation: usize,
}

impl Default for EncryptionConfig {
    fn default() -> Self {
        let PrecisionTarget { factor, backward, set } = PrecisionTarget::default();
        Self { factor, backward, set, compensation: 16 }
    }
}

impl EncryptionConfig {
    /// What products are planned for.
    pub fn target(&self) -> PrecisionTarget {
        PrecisionTarget { factor: self.factor, backward: self.backward, set: self.set }
    }
}

/// `[network]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkConfig {
    /// Addresses to listen on.
    pub listen: Vec<String>,
    /// Peers to dial.
    pub peers: Vec<String>,
    /// Look for peers on the local network.
    pub mdns: bool,
    /// Key file of this peer's identity; without one, an owner is a new peer in every run, which keeps its key with the
    /// results, and a worker keeps its key in the user's configuration folder.
    pub identity: Option<PathBuf>,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            listen: vec!["/ip4/0.0.0.0/tcp/0".into(), "/ip4/0.0.0.0/udp/0/quic-v1".into()],
            peers: Vec::new(),
            mdns: true,
            identity: None,
        }
    }
}

impl NetworkConfig {
    /// The addresses, parsed.
    ///
    /// # Errors
    /// Names the text that is no multiaddress.
    pub fn addresses(&self) -> anyhow::Result<(Vec<Multiaddr>, Vec<Multiaddr>)> {
        Ok((parse_addresses("network.listen", &self.listen)?, parse_addresses("network.peers", &self.peers)?))
    }
}

fn parse_addresses(key: &str, texts: &[String]) -> anyhow::Result<Vec<Multiaddr>> {
    texts
        .iter()
        .map(|text| {
            text.parse().with_context(|| {
                format!("{key}: `{text}` is not a multiaddress; write it like /ip4/192.0.2.7/tcp/4001")
            })
        })
        .collect()
}

/// `[worker]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerConfig {
    /// `none`, `all`, or indices like `0,1`.
    pub gpus: String,
    /// How matrices are spread over several devices.
    pub split: Split,
    /// Memory of this process for layers in MiB; 0 takes what is free when the worker starts. Layers on GPUs take the
    /// GPUs' own.
    pub memory_mib: u64,
    /// Owners served at a time.
    pub max_owners: usize,
    /// The peer ids of the owners that are served; with none, whoever asks first is, within the limits of this section.
    pub owners: Vec<String>,
    /// Rows of one product, at most.
    pub max_tokens: u32,
    /// Memory of the machine for products under way, with their answers, in MiB; each owner has an equal share.
    pub product_memory_mib: u64,
}

impl WorkerConfig {
    /// The owners that are served, parsed.
    ///
    /// # Errors
    /// Names the text that is no peer id.
    pub fn owners(&self) -> anyhow::Result<Vec<PeerId>> {
        let parse = |text: &String| {
            text.parse().with_context(|| {
                format!("worker.owners (--owner): `{text}` is not a peer id; an owner's is like 12D3KooW...")
            })
        };
        self.owners.iter().map(parse).collect()
    }
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            gpus: "none".into(),
            split: Split::Layers,
            memory_mib: 0,
            max_owners: 1,
            owners: Vec::new(),
            max_tokens: 16_384,
            product_memory_mib: 2048,
        }
    }
}

/// `[eval]`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Held-out prompts that are answered at each evaluation; 0 answers none.
    pub generate: usize,
    /// Tokens of an answer at most.
    pub max_tokens: usize,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { generate: 0, max_tokens: 48 }
    }
}

/// Where base products are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// By workers, on ciphertexts.
    Encrypted,
    /// In the owner's process, with f32 weights: the reference for convergence.
    Plain,
}

/// Where the products of the head are computed, which turns hidden states into logits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum HeadChoice {
    /// In the owner's process, with f32 weights.
    Local,
    /// By workers, on ciphertexts, like every other product.
    Remote,
    /// By workers where that spares the owner work and they have room for it.
    #[default]
    Auto,
}

/// Whether what enters the lowest adapted layer is kept on the owner's disk, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrefixChoice {
    /// It is computed each time.
    Off,
    /// Rounded to bfloat16, in half of the room.
    Bf16,
    /// As it is: a run computes the same as without.
    #[default]
    F32,
}

/// `[owner]`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OwnerConfig {
    /// The text to train on: a file or a folder.
    pub data: Option<PathBuf>,
    /// Folder of an adapter in PEFT's format to begin with, in place of a new one.
    pub adapter: Option<PathBuf>,
    /// Folder for the results.
    pub out: PathBuf,
    /// Where base products are computed.
    pub backend: BackendChoice,
    /// Where those of the head are computed, of an owner whose other products are encrypted.
    pub head: HeadChoice,
    /// Workers to wait for.
    pub workers: usize,
    /// Seconds to look for them. When they are over, the run begins with those that were found, if there are any.
    pub discovery_seconds: u64,
    /// Peer ids of the only workers that may serve; empty lets anybody.
    pub allowed: Vec<String>,
    /// Workers that are to serve each layer, where there are enough.
    pub replicas: u16,
    /// Seconds that a run waits for a layer that no worker serves, before it ends.
    pub patience_seconds: u64,
    /// Memory for the products of the masks, in MiB.
    pub mask_cache_mib: u64,
    /// Room for them on the disk of the user's cache folder, in MiB, of which at most half of what is free is taken. What fits
    /// neither is asked of the workers in every step anew.
    pub mask_file_mib: u64,
    /// Keep them there for later runs with the same model, of which then only the first asks workers for them. If not, the
    /// disk holds what memory has no room for, as long as the run lasts.
    pub keep_masks: bool,
    /// Memory for the pads of generation, in MiB; as the model's size suggests where it is not said, and none with 0.
    pub pad_mib: Option<u64>,
    /// Whether what enters the lowest adapted layer is kept for texts that come again, in the folder for the results.
    pub prefix_cache: PrefixChoice,
    /// Room for it, in MiB, of which at most half of what is free on the disk is taken.
    pub prefix_cache_mib: u64,
    /// Leave it there when the run is over.
    pub keep_prefix_cache: bool,
}

impl Default for OwnerConfig {
    fn default() -> Self {
        Self {
            data: None,
            adapter: None,
            out: "velum-out".into(),
            backend: BackendChoice::Encrypted,
            head: HeadChoice::Auto,
            workers: 1,
            discovery_seconds: 60,
            allowed: Vec::new(),
            replicas: 1,
            // A worker that is rebooted, or a link that is down for some minutes.
            patience_seconds: 600,
            // Enough to read ahead; the disk holds the rest.
            mask_cache_mib: 96,
            // With it, all of a model of eight billion.
            mask_file_mib: 16 << 10,
            keep_masks: true,
            pad_mib: None,
            prefix_cache: PrefixChoice::F32,
            // Some thirteen thousand texts of 150 tokens, at the width of a model of a billion parameters.
            prefix_cache_mib: 16 << 10,
            keep_prefix_cache: false,
        }
    }
}

impl OwnerConfig {
    /// Memory for the pads of generation.
    pub fn pads(&self) -> PadRoom {
        self.pad_mib.map_or(PadRoom::OfModel, |mib| PadRoom::Bytes(mib << 20))
    }

    /// The workers that may serve; `None` is anybody.
    ///
    /// # Errors
    /// Names the text that is no peer id.
    pub fn allowed(&self) -> anyhow::Result<Option<HashSet<PeerName>>> {
        let peer = |text: &String| match text.parse::<PeerId>() {
            Ok(peer) => Ok(PeerName::from(peer.to_base58().as_str())),
            Err(_) => bail!(
                "owner.allowed (--worker): `{text}` is not a peer id; a worker prints its own after /p2p/ in its address"
            ),
        };
        let allowed = self.allowed.iter().map(peer).collect::<anyhow::Result<HashSet<_>>>()?;
        Ok((!allowed.is_empty()).then_some(allowed))
    }
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// When it cannot be read, is no TOML, or has a key or value that does not exist; the message names file and line.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("the configuration {} cannot be read", path.display()))?;
        let mut config: Self =
            toml::from_str(&text).with_context(|| format!("the configuration {} is not valid", path.display()))?;
        let table: toml::Table = toml::from_str(&text)?;
        let lora = table.get("training").and_then(|training| training.get("lora")).and_then(toml::Value::as_table);
        config.lora_given = lora.into_iter().flat_map(toml::Table::keys).cloned().collect();
        Ok(config)
    }

    /// Checks what all roles share.
    ///
    /// # Errors
    /// Names the key.
    pub fn validate(&self) -> anyhow::Result<()> {
        self.network.addresses()?;
        self.gpus()?;
        ensure!(self.worker.max_owners > 0, "worker.max_owners must be at least 1");
        ensure!(self.worker.max_tokens > 0, "worker.max_tokens must be at least 1");
        ensure!(self.worker.product_memory_mib > 0, "worker.product_memory_mib must be at least 1");
        self.worker.owners()?;
        ensure!(self.owner.workers > 0, "owner.workers must be at least 1");
        ensure!(self.owner.discovery_seconds > 0, "owner.discovery_seconds must be at least 1");
        ensure!((1..=16).contains(&self.owner.replicas), "owner.replicas must be from 1 (no replicas) to 16");
        ensure!(self.owner.patience_seconds > 0, "owner.patience_seconds must be at least 1");
        ensure!(
            self.owner.backend == BackendChoice::Encrypted || self.owner.head != HeadChoice::Remote,
            "owner.head (--head) is remote, but owner.backend (--backend) is plain, which has no workers: write auto or local"
        );
        self.owner.allowed()?;
        for (name, mib) in [
            ("mask_cache_mib", self.owner.mask_cache_mib),
            ("mask_file_mib", self.owner.mask_file_mib),
            ("pad_mib", self.owner.pad_mib.unwrap_or(0)),
            ("prefix_cache_mib", self.owner.prefix_cache_mib),
        ] {
            ensure!(mib <= 1 << 24, "owner.{name} must be at most 16777216 (16 TiB)");
        }
        ensure!(
            self.encryption.factor.is_finite() && self.encryption.factor > 0.0,
            "encryption.factor must be a positive number; 1.0 means as precise as plain 8-bit arithmetic"
        );
        ensure!(
            self.encryption.backward.is_finite() && self.encryption.backward > 0.0,
            "encryption.backward must be a positive number; 1.0 means gradients as precise as activations"
        );
        ensure!(
            self.encryption.compensation <= 256,
            "encryption.compensation must be at most 256: beyond that it costs the owner more than it gives"
        );
        ensure!(
            self.data.pad_to > 0 && self.data.pad_to <= 1 << 16,
            "data.pad_to must be from 1, which pads nothing, to 65536"
        );
        ensure!(
            (1..=1000).contains(&self.checkpoint.keep),
            "checkpoint.keep must be from 1 to 1000; save_every = 0 and save_minutes = 0 make none while all goes well"
        );
        ensure!(self.eval.generate <= 256, "eval.generate must be at most 256; node eval --generate answers more");
        ensure!(self.eval.max_tokens > 0, "eval.max_tokens must be at least 1; eval.generate = 0 answers nothing");
        self.training.validate().context("[training]")?;
        let nothing_held_out = matches!(self.data.held_out, HeldOut::Count(0) | HeldOut::Fraction(0.0));
        ensure!(
            !nothing_held_out || self.eval.generate == 0,
            "eval.generate is {}, and data.held_out is 0: hold something out that can be asked",
            self.eval.generate
        );
        ensure!(
            !nothing_held_out || (self.training.early_stopping_patience.is_none() && !self.training.loads_best()),
            "training.early_stopping_patience and training.load_best go by the held-out examples, and data.held_out is 0"
        );
        Ok(())
    }

    /// The GPUs asked for.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub fn gpus(&self) -> anyhow::Result<GpuRequest> {
        self.worker.gpus.parse().context("worker.gpus (--gpus)")
    }

    /// The model's path.
    ///
    /// # Errors
    /// When there is none.
    pub fn model(&self) -> anyhow::Result<&Path> {
        match &self.model {
            Some(path) => Ok(path),
            None => bail!(
                "no model: give --model PATH (a Hugging Face folder or a .gguf file), or `model` in the configuration"
            ),
        }
    }

    /// What is trained on: one file or folder, or several with weights.
    ///
    /// # Errors
    /// When there is none, or the configuration says both.
    pub fn data_files(&self) -> anyhow::Result<Vec<DataFile>> {
        match (&self.owner.data, &self.data.files[..]) {
            (Some(path), []) => Ok(vec![DataFile::new(path)]),
            (None, files @ [_, ..]) => Ok(files.to_vec()),
            (Some(_), [_, ..]) => bail!("owner.data and data.files both say what is trained on: take one of them out"),
            (None, []) => {
                bail!("no training data: give --data FILE.jsonl, or `data` under [owner] in the configuration")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn error_of(text: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("velum.toml");
        fs::write(&path, text).unwrap();
        let result = Config::read(&path).and_then(|config| config.validate());
        format!("{:#}", result.unwrap_err())
    }

    #[test]
    fn defaults_are_valid_and_survive_toml() {
        let config = Config::default();
        config.validate().unwrap();
        let text = toml::to_string(&config).unwrap();
        let again: Config = toml::from_str(&text).unwrap();
        assert_eq!(toml::to_string(&again).unwrap(), text);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let message = error_of("[training]\nsteps = 3\nlearning_rat = 0.1\n");
        assert!(message.contains("learning_rat") && message.contains("line 3"), "{message}");
        assert!(error_of("modell = 'x'").contains("modell"));
        assert!(error_of("[data]\nlenght = 3").contains("lenght"));
    }

    #[test]
    fn bad_values_name_their_key() {
        assert!(error_of("[network]\nlisten = ['localhost:1']").contains("network.listen: `localhost:1`"));
        assert!(error_of("[worker]\ngpus = 'one'").contains("worker.gpus"));
        let split = error_of("[worker]\nsplit = 'rows'");
        assert!(split.contains("rows") && split.contains("columns") && split.contains("line 2"), "{split}");
        assert!(error_of("[worker]\nowners = ['me']").contains("worker.owners (--owner): `me`"));
        assert!(error_of("[worker]\nproduct_memory_mib = 0").contains("worker.product_memory_mib"));
        assert!(error_of("[owner]\nworkers = 0").contains("owner.workers"));
        assert!(error_of("[owner]\nreplicas = 0").contains("owner.replicas"));
        assert!(error_of("[owner]\nbackend = 'plain'\nhead = 'remote'").contains("owner.head (--head)"));
        assert!(error_of("[owner]\npatience_seconds = 0").contains("owner.patience_seconds"));
        assert!(error_of("[owner]\nallowed = ['me']").contains("owner.allowed (--worker): `me`"));
        assert!(error_of("[checkpoint]\nkeep = 0").contains("checkpoint.keep"));
        assert!(error_of("[data]\npad_to = 0").contains("data.pad_to"));
        assert!(error_of("[encryption]\nfactor = -1.0").contains("encryption.factor"));
        assert!(error_of("[encryption]\nbackward = 0.0").contains("encryption.backward"));
        assert!(error_of("[encryption]\ncompensation = 257").contains("encryption.compensation"));
        let wrong = error_of("[encryption]\ncompensate = 1");
        assert!(wrong.contains("compensate") && wrong.contains("compensation"), "{wrong}");
    }

    #[test]
    fn data_are_one_path_or_several_files() {
        let files = "files = [{ path = 'a.jsonl', weight = 2.0 }, { path = 'b.parquet' }]";
        let read = |text: &str| toml::from_str::<Config>(text).unwrap().data_files();
        let found = read(&format!("[data]\n{files}")).unwrap();
        assert_eq!(found, [DataFile { path: "a.jsonl".into(), weight: 2.0 }, DataFile::new("b.parquet")]);
        assert_eq!(read("[owner]\ndata = 'a.jsonl'").unwrap(), [DataFile::new("a.jsonl")]);
        let both = read(&format!("[owner]\ndata = 'c.jsonl'\n[data]\n{files}")).unwrap_err().to_string();
        assert!(both.contains("owner.data and data.files"), "{both}");
        assert!(read("").unwrap_err().to_string().contains("--data"));
    }

    #[test]
    fn every_shipped_configuration_is_valid() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
        let entries =
            |folder: &Path| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
        let examples = entries(&folder.join("examples")).into_iter().filter(|example| example.is_dir());
        let examples: Vec<_> = examples.flat_map(|example| entries(&example)).collect();
        let mut seen = 0;
        for path in entries(&folder).into_iter().chain(examples) {
            if path.extension().is_some_and(|extension| extension == "toml") {
                Config::read(&path).and_then(|config| config.validate()).unwrap();
                seen += 1;
            }
        }
        assert!(seen >= 3 + 4, "configs/ has a file for every role, and one for every example");
    }
}
