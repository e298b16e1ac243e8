#include "runtime/cli/doctor/ucx_report.h"

#include <ucp/api/ucp.h>
#include <uct/api/uct.h>

#include <algorithm>
#include <memory>

namespace passel {
namespace {

void AddResource(const uct_tl_resource_desc_t& resource, std::vector<UcxTransport>& out) {
  const std::string name = resource.tl_name;
  const auto it = std::find_if(out.begin(), out.end(),
                               [&](const UcxTransport& known) { return known.name == name; });
  auto& transport = it == out.end() ? out.emplace_back(UcxTransport{name, {}}) : *it;
  transport.devices.emplace_back(resource.dev_name);
}

void AddMemoryDomain(uct_component_h component, const char* name, std::vector<UcxTransport>& out) {
  uct_md_config_t* config = nullptr;
  if (uct_md_config_read(component, nullptr, nullptr, &config) != UCS_OK) return;
  const std::unique_ptr<uct_md_config_t, void (*)(uct_md_config_t*)> config_owner(
      config, [](uct_md_config_t* c) { uct_config_release(c); });
  uct_md_h md = nullptr;
  if (uct_md_open(component, name, config, &md) != UCS_OK) return;
  const std::unique_ptr<uct_md, void (*)(uct_md_h)> md_owner(md, uct_md_close);
  uct_tl_resource_desc_t* resources = nullptr;
  unsigned count = 0;
  if (uct_md_query_tl_resources(md, &resources, &count) != UCS_OK) return;
  for (unsigned i = 0; i < count; ++i) AddResource(resources[i], out);
  uct_release_tl_resource_list(resources);
}

void AddComponent(uct_component_h component, std::vector<UcxTransport>& out) {
  uct_component_attr_t attributes{};
  attributes.field_mask = UCT_COMPONENT_ATTR_FIELD_MD_RESOURCE_COUNT;
  if (uct_component_query(component, &attributes) != UCS_OK) return;
  std::vector<uct_md_resource_desc_t> domains(attributes.md_resource_count);
  if (domains.empty()) return;
  attributes.field_mask = UCT_COMPONENT_ATTR_FIELD_MD_RESOURCES;
  attributes.md_resources = domains.data();
  if (uct_component_query(component, &attributes) != UCS_OK) return;
  for (const auto& domain : domains) AddMemoryDomain(component, domain.md_name, out);
}

}  // namespace

std::string UcxVersion() { return ucp_get_version_string(); }

std::vector<UcxTransport> UcxTransports() {
  std::vector<UcxTransport> out;
  uct_component_h* components = nullptr;
  unsigned count = 0;
  if (uct_query_components(&components, &count) != UCS_OK) return out;
  for (unsigned i = 0; i < count; ++i) AddComponent(components[i], out);
  uct_release_component_list(components);
  return out;
}

}  // namespace passel
