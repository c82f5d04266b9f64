//! The owner's actors with workers as they are, over the network in memory: what is decrypted is the product, however
//! many devices a worker has and however it spreads its matrices over them.

use super::*;
use crate::matmul::{Device, kernels};
use crate::testing::TestDevice;
use crate::transport::MemoryTransport;
use crate::worker::{ShardSource, SourceError, Split, Worker, WorkerLimits};
use protocol::quant::Int8Matrix;

const WIDE: LinearShape = LinearShape { d_in: 48, d_out: 300 };
const DIGEST: ModelDigest = ModelDigest([3; 32]);

/// The weights of a matrix.
fn weights(linear: LinearId) -> Vec<f32> {
    random(WIDE.d_in * WIDE.d_out, 10 * u64::from(linear.layer) + linear.group as u64)
}

/// A model whose matrices all have one shape.
struct Source;

impl ShardSource for Source {
    fn digest(&self) -> ModelDigest {
        DIGEST
    }

    fn layers(&self) -> u16 {
        LAYERS
    }

    fn groups(&self, layer: u16) -> &'static [Group] {
        if layer < LAYERS { &Group::ALL } else { &[] }
    }

    fn shape(&self, _linear: LinearId) -> LinearShape {
        WIDE
    }

    fn load(&self, linear: LinearId) -> Result<(Int8Matrix, LinearMeta), SourceError> {
        Ok(serve(weights(linear), WIDE).unwrap())
    }
}

async fn candidate(network: &MemoryTransport, name: &str, devices: Vec<TestDevice>, split: Split) -> Candidate {
    let devices = devices.into_iter().map(|device| Arc::new(device) as Arc<dyn Device>).collect();
    let limits = WorkerLimits { memory_bytes: 1 << 30, ..WorkerLimits::default() };
    let worker = Worker::start(Arc::new(Source), devices, split, limits, || 0).await.unwrap();
    let peer = PeerName::from(name);
    network.connect(peer.clone(), Arc::new(worker));
    match network.control(&peer, ControlRequest::Offer { version: PROTOCOL_VERSION }).await.unwrap() {
        ControlReply::Offer(offer) => Candidate { peer, offer },
        other => panic!("{other:?}"),
    }
}

fn device(name: &'static str, kernel: usize, speed: f64) -> TestDevice {
    let kernels = kernels();
    TestDevice::new(name, Arc::clone(&kernels[kernel % kernels.len()]), speed, None)
}

#[test]
fn products_are_right_whatever_devices_a_worker_has() {
    for split in Split::ALL {
        actix::System::new().block_on(async {
            let network = Arc::new(MemoryTransport::new("owner".into()));
            let two = vec![device("first", 0, 4.0), device("second", 1, 3.0)];
            let candidates = vec![
                candidate(&network, "two", two, split).await,
                candidate(&network, "one", vec![device("only", 0, 3.0)], split).await,
            ];
            let matrices = linears().map(|linear| {
                let (matrix, meta) = serve(weights(linear), WIDE).unwrap();
                (linear, matrix, meta)
            });
            let table = LayerTable::new(matrices, &PrecisionTarget::default()).unwrap();
            let transport: Arc<dyn Transport> = network;
            let (table, room) = (Arc::new(table), MaskRoom::memory(usize::MAX));
            let actors = OwnerActors::start(table, Arc::clone(&transport), room, PadRoom::OfModel, None).unwrap();
            let settings = FleetSettings::default();
            let assign = AssignLayers { model: DIGEST, layers: LAYERS, candidates, settings };
            let assignments = actors.scheduler.send(assign).await.unwrap().unwrap();
            let assigned: Vec<_> = assignments.iter().map(|a| (a.layers.clone(), a.device.as_str())).collect();
            assert_eq!(assigned, [(0..2, "first and second"), (2..3, "only")]);

            let backend = EncryptedBackend::new(actors.scheduler.clone(), transport, false);
            let check = move || {
                for (number, linear) in linears().enumerate() {
                    for direction in [Direction::Forward, Direction::Backward] {
                        let (tokens, (inner, outer)) = (5, WIDE.along(direction));
                        let rows = random(tokens * inner, 100 + number as u64);
                        let weights = weights(linear);
                        let weight = |i: usize, j: usize| match direction {
                            Direction::Forward => weights[i * WIDE.d_out + j],
                            Direction::Backward => weights[j * WIDE.d_out + i],
                        };
                        let product = |row: &[f32], j| row.iter().enumerate().map(|(i, x)| x * weight(i, j)).sum();
                        let expected: Vec<f32> = rows
                            .chunks(inner)
                            .flat_map(|row| (0..outer).map(move |j| (row, j)))
                            .map(|(row, j)| product(row, j))
                            .collect();
                        let found =
                            backend.apply(linear.along(direction), Arc::new(rows.into()), tokens).unwrap().into_rows();
                        let error = relative_error(&found, &expected);
                        assert!(error < 0.02, "{split} {linear} {direction:?}: relative error {error}");
                    }
                }
            };
            tokio::task::spawn_blocking(check).await.unwrap();
            actors.scheduler.send(ReleaseLayers).await.unwrap();
            actors.stop();
        });
    }
}
