// One block of memory shared by the ranks of a replica: a memfd, so nothing has a name and nothing is left behind
// when every process is gone, however it went.
//
//   header | bells (one 64-byte line each) | regions of groups and pipes
//
// A bell is the only word a rank ever sleeps on. All bells lie in one array, so that an abort can wake every sleeper.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

namespace evener {

// The peers a sleeping rank still waits for, one bit each; 0 while it is awake.
struct alignas(64) Bell {
  std::atomic<uint32_t> awaited;
};

struct alignas(64) Header {
  uint64_t magic;
  uint64_t size;
  uint64_t bells;
  alignas(64) std::atomic<uint32_t> abort;  // 0 running, 1 text being written, 2 text complete
  char device[128];
  char reason[640];
};

constexpr uint64_t kMagic = 0x31'52'45'4e'45'56'45'45;  // bump when the layout of anything shared changes
constexpr uint64_t kPage = 4096;
constexpr uint64_t kMaxRanks = 30;  // bits of Bell::awaited; the top bits are kept for waits without a peer
constexpr uint32_t kNobody = 1u << 31;
static_assert(sizeof(Header) <= kPage && sizeof(Bell) == 64);
static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);

// Raised when the segment was aborted: which device was lost, and why.
struct Aborted {
  std::string device, reason;
};

// Raised when a wait passed its deadline: the peers (bits) that had not arrived.
struct Late {
  uint32_t missing;
};

int64_t now_ns();  // CLOCK_MONOTONIC
int64_t cpu_ns();  // CPU time of the calling thread

// The mapping, unmapped when the last segment, group or pipe that holds it goes.
class Mapping {
 public:
  Mapping(int fd, uint64_t size);
  ~Mapping();
  Mapping(const Mapping&) = delete;

  Header& header() const { return *reinterpret_cast<Header*>(base_); }
  Bell& bell(uint64_t i) const { return reinterpret_cast<Bell*>(base_ + kPage)[i]; }
  char* at(uint64_t offset) const { return base_ + offset; }
  uint64_t size() const { return size_; }
  void check(uint64_t offset, uint64_t bytes, uint64_t first_bell, uint64_t bells) const;

  bool aborted() const { return header().abort.load(std::memory_order_acquire) != 0; }
  Aborted why() const;
  // Wakes every sleeper and makes every later wait fail. The first abort wins; returns whether this was it.
  bool abort(const std::string& device, const std::string& reason);

 private:
  char* base_;
  uint64_t size_;
};

class Segment {
 public:
  static Segment create(uint64_t size, uint64_t bells);
  static Segment attach(int fd);  // takes the descriptor over and closes it
  Segment(Segment&& other) noexcept : map_(std::move(other.map_)), fd_(std::exchange(other.fd_, -1)) {}
  ~Segment() { close(); }

  std::shared_ptr<Mapping> map() const;  // throws once closed
  bool closed() const { return !map_; }
  Segment share() const { return Segment(map(), -1); }  // a hold of its own on the mapping
  int fd() const { return fd_; }
  void close();  // closes the descriptor and drops this hold on the mapping

 private:
  Segment(std::shared_ptr<Mapping> map, int fd) : map_(std::move(map)), fd_(fd) {}
  std::shared_ptr<Mapping> map_;
  int fd_;
};

}  // namespace evener
