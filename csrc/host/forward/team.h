// Threads that run a forward together.
//
// One team serves the process. Its members are started when they are first needed, wait for each other inside of a
// forward by spinning, and sleep between forwards after a short while, so that they take nothing from other threads. A
// forked child starts its own. Members take no signals.
//
// Where torch works between the jobs, its own threads spin for their next work and keep the team's from running. Then jobs
// can be run by torch's threads instead: `use_openmp`.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace sequoia::forward {

class Team {
  public:
    // Runs job(argument, thread) in threads 0..size - 1, thread 0 being the caller. One call at a time.
    using Job = void (*)(void* argument, int thread);
    void run(int size, Job job, void* argument);

    // Returns when all `size` threads of the job have come here; what they wrote before is seen by all. The size is the
    // caller's own number: a thread may still be on its way out of here when the next job, of another size, begins.
    void barrier(int size);

    // Ends the members. The next job starts new ones.
    void stop();

    ~Team() { stop(); }

  private:
    bool run_by_openmp(int size, Job job, void* argument);
    void serve(int thread, std::uint64_t seen);
    void begin(int size);

    std::vector<std::thread> members_;
    Job job_ = nullptr;
    void* argument_ = nullptr;
    std::mutex mutex_;
    std::condition_variable changed_;
    // Jobs so far, and in the low bits how many threads the last one has; none ends the members. One number, so that a
    // member that is late cannot take one job's size for another's.
    alignas(64) std::atomic<std::uint64_t> epoch_{0};
    std::atomic<int> num_sleeping_{0};
    alignas(64) std::atomic<int> num_arrived_{0};
    alignas(64) std::atomic<unsigned> phase_{0};
};

// A lock that is open in the child of a fork, whoever held it.
class ForkedLock {
  public:
    std::mutex& get();

  private:
    std::unique_ptr<std::mutex> mutex_;
    std::uint64_t num_forks_ = 0;  // before it was made
};

// Whether jobs are run by the threads of the OpenMP library that torch has loaded, from the caller's next job on. Returns
// whether they are: there may be no such library.
bool use_openmp(bool wanted);

// Runs a job on the process's team, one caller at a time; a job of one thread needs none.
void run_in_team(int size, Team::Job job, void* argument);
// Ends the team's members, behind the job that runs.
void stop_team();
Team& shared_team();

}  // namespace sequoia::forward
