//! Decodes messages and calls the handler. The layouts of bodies are in the vhost-user specification,
//! "Message payload"; the `vhost` crate has types for them that check themselves.
#![cfg_attr(
    not(test),
    warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)
)]

use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostUserConfig, VhostUserInflight, VhostUserLog,
    VhostUserMemory, VhostUserMemoryRegion, VhostUserSingleMemoryRegion,
    VhostUserTransferDeviceState, VhostUserU64, VhostUserVringAddr, VhostUserVringAddrFlags,
    VhostUserVringState,
};

use super::handler::{Handler, MEMORY_SLOTS};
use super::message::{FileKind, MAX_DESCRIPTORS, Message, Reply, parse, parse_unchecked};
use super::refusal::Refusal;
use super::vring::UserRings;
use crate::ratelimited_log;
use crate::reason::reason;
use crate::virtio::memory::RegionInfo;

/// Bit in the number of a vring: the message has no descriptor.
const NO_DESCRIPTOR: u64 = 0x100;

/// Bits in the reply to SET_DEVICE_STATE_FD: the reply has no descriptor; the transfer failed.
const STATE_NO_DESCRIPTOR: u64 = 0x100;
const STATE_FAILED: u64 = 1;

/// Reply that the request defines; `None` if it defines none, and success is acknowledged on demand.
type DispatchResult = Result<Option<Reply>, Refusal>;

/// Executes `message`. Unused descriptors stay in it.
pub fn dispatch(handler: &mut Handler, message: &mut Message) -> DispatchResult {
    use FrontendReq as Request;
    let request = Request::try_from(message.request).map_err(|_| Refusal::Unknown)?;
    let takes_files = matches!(
        request,
        Request::SET_MEM_TABLE
            | Request::SET_VRING_CALL
            | Request::SET_VRING_KICK
            | Request::SET_VRING_ERR
            | Request::SET_LOG_BASE
            | Request::SET_LOG_FD
            | Request::SET_INFLIGHT_FD
            | Request::ADD_MEM_REG
            | Request::SET_DEVICE_STATE_FD
            | Request::SET_BACKEND_REQ_FD
            // Some front-ends send a descriptor, which the specification says to ignore.
            | Request::REM_MEM_REG
    );
    if !takes_files {
        message.expect_files(0)?;
    }
    match request {
        Request::GET_FEATURES
        | Request::SET_FEATURES
        | Request::GET_PROTOCOL_FEATURES
        | Request::SET_PROTOCOL_FEATURES
        | Request::SET_OWNER
        | Request::RESET_OWNER
        | Request::RESET_DEVICE
        | Request::GET_QUEUE_NUM
        | Request::GET_MAX_MEM_SLOTS => device(handler, request, message),
        Request::SET_MEM_TABLE | Request::ADD_MEM_REG | Request::REM_MEM_REG => {
            memory(handler, request, message)
        }
        Request::SET_VRING_NUM
        | Request::SET_VRING_ADDR
        | Request::SET_VRING_BASE
        | Request::GET_VRING_BASE
        | Request::SET_VRING_ENABLE => vring(handler, request, message),
        Request::SET_VRING_CALL | Request::SET_VRING_KICK | Request::SET_VRING_ERR => {
            eventfd(handler, request, message)
        }
        Request::GET_CONFIG | Request::SET_CONFIG => config(handler, request, message),
        Request::GET_INFLIGHT_FD | Request::SET_INFLIGHT_FD => inflight(handler, request, message),
        Request::SET_LOG_BASE => log_base(handler, message),
        // Eventfd of changes of the dirty log, which this back-end does not signal.
        Request::SET_LOG_FD => Ok(None),
        Request::SET_BACKEND_REQ_FD => backend_channel(handler, message),
        Request::SET_DEVICE_STATE_FD | Request::CHECK_DEVICE_STATE => {
            device_state(handler, request, message)
        }
        _ => Err(Refusal::Unknown),
    }
}

fn device(handler: &mut Handler, request: FrontendReq, message: &Message) -> DispatchResult {
    use FrontendReq as Request;
    match request {
        Request::SET_FEATURES => {
            let features: VhostUserU64 = message.body()?;
            return handler.set_features(features.value).map(|()| None);
        }
        Request::SET_PROTOCOL_FEATURES => {
            let features: VhostUserU64 = message.body()?;
            return handler.set_protocol_features(features.value).map(|()| None);
        }
        _ => message.no_body()?,
    }
    let number = match request {
        Request::GET_FEATURES => handler.offered(),
        Request::GET_PROTOCOL_FEATURES => handler.protocol_features(),
        Request::GET_QUEUE_NUM => handler.queue_num() as u64,
        Request::GET_MAX_MEM_SLOTS => MEMORY_SLOTS as u64,
        Request::RESET_OWNER | Request::RESET_DEVICE => {
            handler.reset_device();
            return Ok(None);
        }
        // SET_OWNER: a connection has one owner.
        _ => return Ok(None),
    };
    Ok(Some(Reply::number(number)))
}

fn region(region: &VhostUserMemoryRegion) -> RegionInfo {
    RegionInfo {
        guest: region.guest_phys_addr,
        len: region.memory_size,
        user: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

fn memory(handler: &mut Handler, request: FrontendReq, message: &mut Message) -> DispatchResult {
    if request == FrontendReq::SET_MEM_TABLE {
        let regions = memory_table(message)?;
        message.expect_files(regions.len())?;
        for file in &message.files {
            FileKind::Memory.check(file)?;
        }
        let files = message.files.drain(..);
        let regions = regions.into_iter().zip(files).collect();
        return handler.set_memory(regions).map(|()| None);
    }
    let single: VhostUserSingleMemoryRegion = message.body()?;
    let info = region(&single);
    match request {
        FrontendReq::ADD_MEM_REG => handler.add_memory(info, message.file(FileKind::Memory)?)?,
        _ => handler.remove_memory(info)?,
    }
    Ok(None)
}

/// Regions of SET_MEM_TABLE.
fn memory_table(message: &Message) -> Result<Vec<RegionInfo>, Refusal> {
    let (head, rest) = message.head_and_rest::<VhostUserMemory>()?;
    let count = head.num_regions as usize;
    let len = count.checked_mul(size_of::<VhostUserMemoryRegion>());
    if count > MAX_DESCRIPTORS || Some(rest.len()) != len {
        return Err(message.bad_body());
    }
    let regions = rest.chunks_exact(size_of::<VhostUserMemoryRegion>());
    let regions = regions.map(|bytes| parse(bytes).map(|one| region(&one)));
    let regions: Option<Vec<_>> = regions.collect();
    regions.ok_or_else(|| message.bad_body())
}

fn vring(handler: &mut Handler, request: FrontendReq, message: &Message) -> DispatchResult {
    use FrontendReq as Request;
    if request == Request::SET_VRING_ADDR {
        let address: VhostUserVringAddr = message.body()?;
        let logged = address.flags & VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits() != 0;
        let rings = UserRings {
            descriptors: address.descriptor,
            available: address.available,
            used: address.used,
            used_log: logged.then_some(address.log),
        };
        return handler.set_vring_rings(address.index, rings).map(|()| None);
    }
    let VhostUserVringState { index, num } = message.body()?;
    match request {
        Request::SET_VRING_NUM => handler.set_vring_size(index, num)?,
        Request::SET_VRING_BASE => handler.set_vring_base(index, num)?,
        Request::SET_VRING_ENABLE if num > 1 => return Err(message.bad_body()),
        Request::SET_VRING_ENABLE => {
            handler.change_vring(index, |vring| vring.set_enabled(num == 1))?;
        }
        // GET_VRING_BASE
        _ => {
            let base = handler.stop_vring(index)?;
            let words = [index, u32::from(base)].map(u32::to_le_bytes);
            return Ok(Some(Reply::bytes(words.as_flattened().to_vec())));
        }
    }
    Ok(None)
}

fn eventfd(handler: &mut Handler, request: FrontendReq, message: &mut Message) -> DispatchResult {
    let VhostUserU64 { value } = message.body()?;
    let file = match value & NO_DESCRIPTOR {
        0 => Some(message.file(FileKind::Eventfd)?.into()),
        _ => {
            message.expect_files(0)?;
            None
        }
    };
    let index = (value & 0xff) as u32;
    handler.change_eventfds(index, |vring| match request {
        FrontendReq::SET_VRING_CALL => vring.set_call(file),
        FrontendReq::SET_VRING_ERR => vring.set_error(file),
        _ => vring.set_kick(file),
    })?;
    Ok(None)
}

fn config(handler: &mut Handler, request: FrontendReq, message: &Message) -> DispatchResult {
    if request == FrontendReq::GET_CONFIG {
        return read_config(handler, message);
    }
    let (head, bytes) = message.head_and_rest::<VhostUserConfig>()?;
    if bytes.len() != head.size as usize {
        return Err(message.bad_body());
    }
    handler.set_config(head.offset, bytes).map(|()| None)
}

/// Answers GET_CONFIG. The reply has no bytes if the range is outside the configuration space.
fn read_config(handler: &mut Handler, message: &Message) -> DispatchResult {
    let split = message.body.split_at_checked(size_of::<VhostUserConfig>());
    let (head, rest) = split.ok_or_else(|| message.bad_body())?;
    let head: VhostUserConfig = parse_unchecked(head).ok_or_else(|| message.bad_body())?;
    let (offset, size, flags) = (head.offset, head.size, head.flags);
    let bytes = match rest.len() == size as usize {
        true => handler.config(offset, size).unwrap_or_default(),
        false => Vec::new(),
    };
    let words = [offset, bytes.len() as u32, flags].map(u32::to_le_bytes);
    Ok(Some(Reply::bytes([words.as_flattened(), &bytes].concat())))
}

fn inflight(handler: &mut Handler, request: FrontendReq, message: &mut Message) -> DispatchResult {
    if request == FrontendReq::SET_INFLIGHT_FD {
        let given = message.body()?;
        let file = message.file(FileKind::Memory)?;
        return handler.set_inflight(&given, &file).map(|()| None);
    }
    let asked = parse_unchecked(&message.body).ok_or_else(|| message.bad_body())?;
    // A reply with length 0 and no descriptor means failure. The front-end continues without an area.
    let (given, file) = match handler.create_inflight(&asked) {
        Ok((given, file)) => (given, Some(file)),
        Err(refusal) => {
            ratelimited_log::warn(format_args!(
                "cannot create the in-flight area: {}",
                reason(&refusal)
            ));
            let none = VhostUserInflight {
                mmap_size: 0,
                ..asked
            };
            (none, None)
        }
    };
    let places = [given.mmap_size, given.mmap_offset].map(u64::to_le_bytes);
    let sizes = [given.num_queues, given.queue_size, 0, 0].map(u16::to_le_bytes);
    let body = [places.as_flattened(), sizes.as_flattened()].concat();
    Ok(Some(Reply { body, file }))
}

fn log_base(handler: &mut Handler, message: &mut Message) -> DispatchResult {
    let log: VhostUserLog = message.body()?;
    let file = message.file(FileKind::Memory)?;
    handler.set_log(&log, &file)?;
    Ok(Some(Reply::bytes(message.body.clone())))
}

fn backend_channel(handler: &mut Handler, message: &mut Message) -> DispatchResult {
    message.no_body()?;
    let channel = message.file(FileKind::UnixStream)?;
    // The session closes it with the message, because close(2) may block.
    message.files.extend(handler.set_backend_channel(channel));
    Ok(None)
}

fn device_state(
    handler: &mut Handler,
    request: FrontendReq,
    message: &mut Message,
) -> DispatchResult {
    if request == FrontendReq::CHECK_DEVICE_STATE {
        message.no_body()?;
        let checked = handler.check_state();
        let failed = u64::from(checked.is_err());
        // The session closes it with the message, because close(2) may block.
        message.files.extend(checked.ok().flatten());
        return Ok(Some(Reply::number(failed)));
    }
    let state: VhostUserTransferDeviceState = message.body()?;
    let answer = match message.file(FileKind::Stream) {
        Ok(stream) if state.direction == VhostTransferStateDirection::LOAD as u32 => {
            message.files.extend(handler.load_state(stream));
            STATE_NO_DESCRIPTOR
        }
        Ok(stream) => {
            // The session closes it with the message.
            message.files.push(stream);
            STATE_NO_DESCRIPTOR
        }
        Err(Refusal::FileKind { .. }) => STATE_NO_DESCRIPTOR | STATE_FAILED,
        Err(refusal) => return Err(refusal),
    };
    Ok(Some(Reply::number(answer)))
}
